"""Golden images: a region of each released version of the format, which every later version must open.

``format-NAME.txt`` is a region as a version of the format has it, ``format-NAME.json`` what is in it, both written by
``make.py`` with the commands of the release that had this format first.  They are never written again.
"""
