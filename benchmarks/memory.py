"""Memory of one training step, measured: python benchmarks/memory.py

Each setting runs one float32 AdamW step on the CPU in a process of its own and reports the peak of its resident memory
above what the imports take. A GPU holds the same tensors, under bfloat16 autocast fewer bytes of them, plus the CUDA
context. BERT-base is built from a configuration, so nothing is downloaded: memory does not depend on the weights.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "Swin UNETR alone": {"plain": True},
    "BiPVL-Seg": {},
    "BiPVL-Seg, checkpointing": {"model.checkpointing": True},
}
BERT_BASE = {"layers": 12, "width": 768, "heads": 12, "max_tokens": 512}


def measure(setting: dict, batch: int) -> dict:
    """Run one step in this process. Returns bytes and counts."""
    sys.path.insert(0, str(ROOT / "apps" / "bipvl"))
    import torch

    from lib.losses import segmentation_loss
    from lib.nets import build_model
    from lib.tasks import load_task
    from lib.trainers.objective import TrainingNetwork

    plain = setting.pop("plain", False)
    task = load_task("amos22-ct", {"model.text": "scratch", "model.scratch": BERT_BASE, **setting})
    torch.manual_seed(0)
    base = resident()
    peak = Peak()
    model = build_model(task)
    network = torch.nn.Sequential(model.vision, model.head) if plain else TrainingNetwork(model, task)
    if plain:
        del model
    optimizer = torch.optim.AdamW(network.parameters())
    image = torch.rand(batch, 1, *task.patch)
    label = torch.randint(0, task.out_channels, (batch, 1, *task.patch))
    start = time.perf_counter()
    loss = segmentation_loss(network(image), label) if plain else network(image, label)["loss"]
    loss.backward()
    optimizer.step()
    return {
        "peak_bytes": peak.stop() - base,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Peak:
    """The largest resident memory while it runs, read every 10 ms."""

    def __init__(self) -> None:
        self.value, self.running = resident(), True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while self.running:
            self.value = max(self.value, resident())
            time.sleep(0.01)

    def stop(self) -> int:
        self.running = False
        self.thread.join()
        return self.value


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(json.loads(sys.argv[1]), int(sys.argv[2]))))
        return
    print(f"{'setting':28} {'parameters':>12} {'peak GiB':>9}")
    for name, setting in SETTINGS.items():
        command = [sys.executable, __file__, json.dumps(setting), "1"]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        print(f"{name:28} {result['parameters'] / 1e6:10.1f} M {result['peak_bytes'] / 2**30:9.2f}", flush=True)


if __name__ == "__main__":
    main()
