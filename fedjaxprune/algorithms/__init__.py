"""Methods: the one room where the two wings meet; one file, one paper."""
