"""A second, independently written reader of the format, and what it says of the code.  Imports nothing from pkernfs."""
