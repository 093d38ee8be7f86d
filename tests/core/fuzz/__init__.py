"""The fuzzer of hostile images: sound images are mutated, and every reader and operation is let loose on each.

    images      small sound regions, one for each kind of content
    catalogue   where every field of every structure of an image is
    mutate      what is stored there instead; with a right checksum, mostly
    oracle      what an operation may cost, raise and store
    readers     all that pkernfs can do with a region
    run         one image, many images, the table

`python -m tests.core.fuzz --images 10000` is the long form; tests/core/test_hostile.py runs the short one.
"""
