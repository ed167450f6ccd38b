"""All that decides the data of a run, checked when it is made."""

import dataclasses

from jaxlm.data.conversations import TOO_LONG
from jaxlm.data.sources import SourceSpec


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """The keys of `config.data`; `sources` come from its groups `mix` and `add`."""

    sources: tuple[SourceSpec, ...]
    tokenizer: str = "bpe"  # "bpe", "byte", or a folder with a Hugging Face tokenizer
    vocabulary: int = 4096  # of a trained "bpe"
    length: int = 128  # tokens of a row
    held_out: float = 0.045  # share of the documents kept for evaluation
    skip_malformed: float = 0.01  # share of a source's rows that may be unreadable
    stages: str = ""  # weights over time, see `mix`; "" = the sources' weights throughout
    attend_across_documents: bool = False  # see `pack.to_batch`
    # Of conversations: "" = the tokenizer's own or else "plain"; "plain", "chatml", a .jinja file.
    template: str = ""
    too_long: str = "drop"  # a conversation longer than a row: "drop" it, cut its "start" or "end"

    def __post_init__(self):
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError(
                "the data has no source; add one with --config.data.add=name:path:weight"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the sources {twice} are defined twice; give each its own name")
        if not 0 <= self.held_out < 1 or not 0 <= self.skip_malformed <= 1:
            raise ValueError(
                f"held_out={self.held_out} and skip_malformed={self.skip_malformed} are shares "
                f"from 0 to 1"
            )
        if self.length < 2:
            raise ValueError(f"length={self.length} leaves nothing to train on; use 2 or more")
        if self.tokenizer == "bpe" and self.vocabulary < 258:
            raise ValueError(
                f"vocabulary={self.vocabulary} must be at least 258: 256 bytes, bos and eos"
            )
        if self.too_long not in TOO_LONG:
            raise ValueError(
                f"too_long={self.too_long!r} may be 'drop', 'start' (cut there) or 'end'"
            )
        if self.structured and self.attend_across_documents:
            raise ValueError(
                "attend_across_documents=True would let conversations of a row see each other, and "
                f"the source {self.structured[0].name!r} holds conversations; set it False"
            )

    @property
    def structured(self) -> list[SourceSpec]:
        """The sources of conversations, preferences or feedback."""
        return [source for source in self.sources if source.structured]
