"""Rank the layers of a softmax model by how much they need softmax, and choose those to convert.

    python launch/rank_layers.py --run=runs/tiny-synthetic
    python launch/rank_layers.py --run=runs/tiny-synthetic --share=0.67 --by=swap --stage2_steps=50
    python launch/rank_layers.py --config=configs/wan1p3b.py --config.teacher.weights=FOLDER \
        --config.stage1.steps=200 --config.evaluation.clips=4

--run takes a finished run's configuration and its teacher; --config takes both as launch/train.py
does. Stage 1 converts all layers, and each is measured, cheapest first:

  layer_error        relative error of the layer's attention after stage 1
  retention          share of its state that survives a block, median over heads
  swap               change of the model's x0 when this layer alone is hybrid
  exchange           only with synthetic clips: drawings that show the twin's sprite when only this
                     layer reads the twin's softmax cache
  swap_after_stage2  as swap, after --stage2_steps of stage 2 for each layer alone

A table and the flag for launch/train.py are printed; ranking.json and ranking.png are written to
--out.
"""

from absl import flags

import command_line

_CONFIG = command_line.config_flag()
_RUN = flags.DEFINE_string("run", None, "Folder of a finished run, whose teacher is ranked.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; by default the run's with -ranking.")
_MEASURES = flags.DEFINE_list("measures", [], "What to measure; by default all that can be.")
_BY = flags.DEFINE_string("by", None, "Measure to choose layers by; by default the last.")
_SHARE = flags.DEFINE_float("share", 0.75, "Share of the layers to convert, rounded down.")
_STAGE1 = flags.DEFINE_integer("stage1_steps", None, "Steps of stage 1; the run's by default.")
_STAGE2 = flags.DEFINE_integer("stage2_steps", 0, "Steps of stage 2 for each layer alone; 0: none.")


def main():
    """Print the table, and write the file and the picture."""
    # Imported late: a mistyped flag should not wait for jax.
    import dataclasses

    from arl2_jax.config import from_config_dict
    from arl2_jax.evaluation.rank_layers import RankChoice, rank_layers
    from arl2_jax.evaluation.ranking import ranking_table
    from arl2_jax.generation.finished_run import teacher_of_run

    config = teacher_of_run(_RUN.value) if _RUN.value else from_config_dict(_CONFIG.value)
    if _STAGE1.value is not None:
        stage1 = dataclasses.replace(config.stage1, steps=_STAGE1.value)
        config = dataclasses.replace(config, stage1=stage1)
    out = _OUT.value or f"{(_RUN.value or config.train.workdir).rstrip('/')}-ranking"
    choice = RankChoice(tuple(_MEASURES.value), _BY.value, _SHARE.value, _STAGE2.value)
    ranking = rank_layers(config, out, choice)
    print(ranking_table(ranking))
    hybrid = tuple(ranking["hybrid_layers"])
    print(f"\n--config.model.hybrid_layers='{hybrid}'")
    print(f"measures: {out}/ranking.json; picture: {out}/ranking.png")


if __name__ == "__main__":
    command_line.run(
        main, one_of=["config", "run"], config=_CONFIG, names={"train.workdir": "out"},
        save_memory="lower stage1.batch_size or evaluation.clips of the configuration",
    )  # fmt: skip
