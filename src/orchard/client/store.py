"""Where personal tensors live between rounds: on the client's own disk, and nowhere else.

Every round that a client trains writes one file, whole or not at all. A file is bound to the
digest of the base it was trained on. A round that is run again, because the server did not
complete it, starts from the version before it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from orchard.results import write_atomically
from orchard.trees import Tree


@dataclass(frozen=True)
class Personal:
    """Tensors that never leave a client: deliberately no mapping, so no update can hold one.

    Attributes:
        tensors: Name to tensor, on the CPU.
    """

    tensors: Tree


@dataclass(frozen=True)
class ClientStore:
    """One client's folder.

    Attributes:
        folder: Its path; it need not exist yet.
        base_digest: SHA-256 of the base model's tensors.
    """

    folder: Path
    base_digest: str

    def beside(self, name: str) -> ClientStore:
        """Return a store of other things of this client, in a folder below this one."""
        return replace(self, folder=self.folder / name)

    def _versions(self) -> dict[int, Path]:
        return {
            int(path.stem.partition("_")[2]): path
            for path in self.folder.glob("round_*.safetensors")
        }

    def load(self, *, before_round: int) -> Personal | None:
        """Return the newest version that an earlier round wrote, or None where there is none.

        Raises:
            ValueError: It belongs to another base model.
        """
        earlier = {
            number: path for number, path in self._versions().items() if number < before_round
        }
        if not earlier:
            return None
        path = earlier[max(earlier)]
        with safe_open(path, framework="pt") as file:
            base = json.loads(file.metadata()["orchard"])["base_digest"]
            if base != self.base_digest:
                raise ValueError(
                    f"personal tensors of {self.folder.name} must belong to this base model, got "
                    f"base {base[:12]} instead of {self.base_digest[:12]}; "
                    "use the model they were trained on, or another --out"
                )
            return Personal({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def save(self, personal: Personal, *, round_number: int) -> None:
        """Write what the client keeps after ``round_number``.

        The two versions before it stay: the server keeps two checkpoints, and may have to go back
        to the older one. What is older goes.
        """
        versions = self._versions()
        earlier = sorted(number for number in versions if number < round_number)
        for number in earlier[:-2]:
            versions[number].unlink()
        header = {"base_digest": self.base_digest, "round_number": round_number}
        tensors = {name: tensor.contiguous() for name, tensor in personal.tensors.items()}
        content = save(tensors, metadata={"orchard": json.dumps(header)})
        write_atomically(self.folder / f"round_{round_number:06d}.safetensors", content)
