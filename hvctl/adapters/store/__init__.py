"""What hvctl remembers: the database, its tables, and what each part of hvctl keeps there."""
