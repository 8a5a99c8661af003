"""python -m analyses.NAME: config -> run -> tidy tables -> CSV and figure."""
