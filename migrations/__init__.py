"""Alembic's migrations of the store, as an installed package; run by `pdbatch db upgrade`."""
