"""Everything a user may say, said once: the types of QMP, the command line and the Python API.

`qapi` is the vocabulary of declarations; `sockets`, `block`, `export`, `qom`, `char` and `control` use it to
declare types, commands and events; `registry` lists the latter. From the declarations, `visit` validates
input, `keyval` reads command-line options, `introspect` answers query-qmp-schema and `help` explains.
"""
