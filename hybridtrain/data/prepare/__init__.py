"""`hybridtrain prepare`: reads sources, tokenizes them in pieces, and joins the pieces into token files."""
