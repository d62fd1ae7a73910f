"""The columns of all tables: what each key in a row is called, and how its value is written. Defined only here."""

from .table import Column

COLUMNS: dict[str, Column] = {
    column.key: column
    for column in (
        Column("model", "model"),
        Column("row", "row"),
        Column("curve", "curve"),
        Column("method", "method"),
        Column("test", "at test"),
        Column("budget", "budget", ".2f"),
        Column("batch_size", "batch size", "d"),
        Column("accuracy", "accuracy", ".2%"),
        Column("drop", "accuracy lost", ".2%"),
        Column("accuracy_std", "std", ".2%"),
        Column("gain", "accuracy gained", "+.2%"),
        Column("n", "n", "d"),
        Column("published", "published", ".2%"),
        Column("over_alone", "over trained alone", "+.2%"),
        Column("entropy", "entropy if correct", ".3f"),
        Column("divergence", "divergence [nats]", ".4f"),
        Column("typical", "typical divergence", ".2e"),
        Column("seconds", "test time [s]", ".2f"),
        Column("ms", "ms", ".2f"),
        Column("p50_ms", "p50 [ms]", ".2f"),
        Column("p95_ms", "p95 [ms]", ".2f"),
        Column("speed", "speed ratio", ".2f"),
        Column("speedup", "speed ratio", ".2f"),
        Column("images_per_second", "images/s", ".1f"),
        Column("macs", "MACs", ",d"),
        Column("macs_linear_only", "MACs, linear only", ",d"),
        Column("gmacs", "GMACs", ".4f"),
        Column("gmacs_linear_only", "GMACs, linear only", ".4f"),
        Column("macs_ratio", "MACs ratio", ".2f"),
        Column("params", "parameters", ",d"),
        Column("peak_mib", "peak memory [MiB]", ".0f"),
        Column("train_seconds", "training [s]", ".0f"),
        Column("tokens", "tokens leaving each block"),
        Column("statement", "statement"),
        Column("found", "found", "g"),
        Column("given", "given model", "g"),
        Column("asked", "asked", "g"),
        Column("met", "met"),
        Column("certificate", "certificate", "g"),
        Column("here", "here", "g"),
        Column("holds", "holds here"),
        Column("kind", "kind"),
        Column("reduction", "tokens"),
        Column("share", "share of the width", ".2f"),
        Column("width_macs", "MACs of the width", ".3f"),
        Column("price", "budget used", ".3f"),
        Column("agreement", "agreement", ".2%"),
        Column("images", "images", "d"),
        Column("what", "what"),
        Column("number", "number", "d"),
        Column("values", "values"),
    )
}
"""Key -> column."""


def columns(*keys: str) -> tuple[Column, ...]:
    """The columns of these keys, in this order."""
    return tuple(COLUMNS[key] for key in keys)
