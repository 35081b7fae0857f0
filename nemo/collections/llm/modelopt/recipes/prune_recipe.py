"""Recipe that prunes any GPT or Mamba checkpoint."""

import nemo_run as run

from nemo.collections import llm

from .. import PruningConfig

NAME = "default"


@run.cli.factory(target=llm.prune, name=NAME)
def prune_recipe(nemo_checkpoint: str, save_path: str) -> run.Partial:
    """Return ``llm.prune`` with mock data and no target: set what is to be pruned, and the data, before running it.

    Args:
        nemo_checkpoint: NeMo checkpoint to prune.
        save_path: where the pruned checkpoint goes.

    Examples:
        >>> recipe = prune_recipe(nemo_checkpoint="/models/llama-8b", save_path="/models/llama-4b")
        >>> recipe.pruning_config.target_ffn_hidden_size = 9216
        >>> recipe.data = run.Config(llm.PreTrainingDataModule, paths=["/data/text"], seq_length=8192)
        >>> recipe.data.micro_batch_size = recipe.data.global_batch_size = 1
        >>> recipe.devices = recipe.pp_size = 8
        >>> run.run(recipe)
    """
    mock_data = run.Config(llm.MockDataModule, seq_length=256, micro_batch_size=1, global_batch_size=1)
    sizes = {"devices": 1, "num_nodes": 1, "tp_size": 1, "pp_size": 1}
    return run.Partial(
        llm.prune,
        nemo_checkpoint=nemo_checkpoint,
        save_path=save_path,
        pruning_config=run.Config(PruningConfig),
        data=mock_data,
        num_train_samples=1024,
        legacy_ckpt=False,
        **sizes,
    )
