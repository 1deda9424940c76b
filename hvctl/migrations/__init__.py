"""The history of the database's schema, run by Alembic (env.py) from hvctl.adapters.store.schema."""
