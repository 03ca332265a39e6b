"""Stage `robustness`: `python -m pipelines.robustness` measures data/model on changed pictures of `data.val`.

data/robustness/robustness.json    every figure: by part, corruption and severity, with intervals
data/metrics/robustness.json       over all corruptions: {clean, AP: {part: AP}, retained: {part: [share, low, high]}}
data/plots/robustness.csv          what is retained of `evaluate.metric`'s part, by corruption

Where params.yaml has robustness.enabled: false, the three are there and empty.
"""

from __future__ import annotations

import os
import sys

from cigpose.config import Config
from cigpose.files.atomic import write_json, write_text
from pipelines.paths import ROBUSTNESS, ROBUSTNESS_METRICS, ROBUSTNESS_PLOT, SHARDS, WEIGHTS
from pipelines.stage import stage


@stage("robustness", writes=(ROBUSTNESS, ROBUSTNESS_METRICS, ROBUSTNESS_PLOT))
def main(config: Config) -> None:
    """Measure the trained model on changed pictures."""
    if not config.robustness.enabled:
        write_json(ROBUSTNESS, {})
        write_json(ROBUSTNESS_METRICS, {})
        write_text(ROBUSTNESS_PLOT, "corruption,retained,AP\n")
        print("robustness: not asked for (robustness.enabled in params.yaml).")
        return
    import torch  # takes seconds, which the empty result need not

    from cigpose.evaluate.checkpoint import merge_config
    from cigpose.evaluate.robustness import measure_robustness, write_retained_csv
    from cigpose.model.device import choose_device
    from cigpose.model.weights import load_checkpoint

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = choose_device(None)
    model = load_checkpoint(WEIGHTS)
    measured_by = merge_config(model.config, config, where=str(WEIGHTS))
    found = measure_robustness(model.to(device), measured_by, shards_root=SHARDS, device=device)
    write_json(ROBUSTNESS, found.to_mapping())
    write_json(ROBUSTNESS_METRICS, found.summary())
    write_retained_csv(found.retained, config.evaluate.metric.partition("/")[0], ROBUSTNESS_PLOT)
    print(found.to_markdown(), end="")


if __name__ == "__main__":
    sys.exit(main())
