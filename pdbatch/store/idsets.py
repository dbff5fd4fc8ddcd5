"""`column IN (any number of ids)` as one parameter, the same statement on both databases.

PostgreSQL takes an array; SQLite takes JSON, and looks each id up in the column's index.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Boolean, ColumnElement, Dialect, Text, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine


class _IdSet(TypeDecorator[Collection[int]]):
    """Ids on their way to the database."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(ARRAY(BigInteger()))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: Collection[int] | None, dialect: Dialect) -> Any:
        ids = list(value or ())
        return ids if dialect.name == "postgresql" else json.dumps(ids)


class _IsIn(FunctionElement[bool]):
    """column, ids"""

    type = Boolean()
    inherit_cache = True

    def self_group(self, against: Any = None) -> _IsIn:
        """Itself: a condition as it is. (`= 1` behind it would hide the index from SQLite.)"""
        return self


@compiles(_IsIn, "postgresql")
def _in_array(element: _IsIn, compiler: SQLCompiler, **options: Any) -> str:
    column, ids = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} = ANY ({ids})"


@compiles(_IsIn, "sqlite")
def _in_json(element: _IsIn, compiler: SQLCompiler, **options: Any) -> str:
    column, ids = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({ids}))"


def is_in(column: ColumnElement[Any], ids: Collection[int] | str) -> ColumnElement[bool]:
    """True for rows whose `column` is one of `ids`; a string names a parameter that a
    prepared statement gets its ids by."""
    if isinstance(ids, str):
        return _IsIn(column, bindparam(ids, type_=_IdSet()))
    return _IsIn(column, bindparam(None, list(ids), type_=_IdSet(), unique=True))
