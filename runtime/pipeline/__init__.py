"""Pipeline stages at run time: what each does in which order, and what carries it out."""
