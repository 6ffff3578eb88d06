"""One module per verb of `cnx2`: `add_arguments(parser)`, `run(args, overrides)`, and `TAKES_OVERRIDES`."""
