"""Results for people: what a row says (rows.py), how it looks on a terminal (table.py), and how a running sweep is shown (progress.py)."""
