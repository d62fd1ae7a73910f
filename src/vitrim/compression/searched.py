"""Which images a search used, where no test split keeps them apart from those that are compared later."""

from dataclasses import dataclass
from typing import Any

from ..data.streams import Stream
from .certificate import Certificate

KEY = "searched"
NOT_KNOWN = (
    "These images have no test split, and which of them the search used is not known: if it used any, closeness looks "
    "better here than it is on new images."
)


@dataclass(frozen=True)
class Searched:
    """The images of a search: the first ones of a stream, in the order in which `images.read` reads it.

    images: fingerprint of the stream. number: how many of them the search used, or could not read.
    """

    images: str
    number: int

    @classmethod
    def of(cls, certificate: Certificate) -> "Searched | None":
        """Those of a certificate; None where it names none, since it was measured on a test split."""
        found: Any = certificate.source.get(KEY)
        if not isinstance(found, dict) or type(found.get("number")) is not int or found["number"] < 0:
            return None
        return cls(str(found.get("images")), found["number"])

    def among(self, stream: Stream) -> tuple[int, str]:
        """How many images to leave out from the front of this stream, and what to say about it."""
        if stream.fingerprint() != self.images:
            return 0, NOT_KNOWN
        return self.number, f"The images that the search used are left out: {self.number} of {len(stream)}."

    @property
    def elsewhere(self) -> str:
        """What to say where other images are compared."""
        return (
            f"The search used {self.number} images that have no test split; any of them that are among the images here "
            "are not left out."
        )


def searched(stream: Stream, number: int) -> dict[str, Any]:
    """The record for a certificate, which `Searched.of` reads."""
    return {"images": stream.fingerprint(), "number": number}
