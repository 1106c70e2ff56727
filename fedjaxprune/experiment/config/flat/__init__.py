"""The flat configuration of schema 1, until `run` reads the nested one."""
