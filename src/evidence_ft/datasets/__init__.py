"""Data formats, one to a file: ``Config`` says where the data is, ``load`` reads a split of it."""
