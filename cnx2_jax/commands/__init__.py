"""One module per verb of `cnx2`: `add_arguments(parser)` and `run(args)`."""
