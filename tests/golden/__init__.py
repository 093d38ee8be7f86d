"""Golden images: a region of each released version of the format, which every later version must open.

``format-N.txt`` is a region as version N of the format has it, ``format-N.json`` what is in it, both written by
``make.py`` with the commands of the release that had this format first.  They are never written again.
"""
