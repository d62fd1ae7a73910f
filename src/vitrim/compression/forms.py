"""How the statements of a certificate are written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How a statement is written: in words, its number format, and whether a small value is good."""

    words: str
    form: str
    small_is_good: bool = True


FORMS: dict[str, Form] = {
    "macs": Form("MACs", ",.0f"),
    "params": Form("parameters", ",.0f"),
    "time": Form("time ratio", ".3f"),
    "ms": Form("ms per batch", ".2f"),
    "divergence": Form("divergence", ".3g"),
    "agreement": Form("same top class", ".2%", False),
    "drop": Form("accuracy lost", ".2%"),
    "accuracy": Form("accuracy", ".2%", False),
    "over_tokens": Form("divergence over tokens alone", "+.3g"),
    "over_width": Form("divergence over width alone", "+.3g"),
}
