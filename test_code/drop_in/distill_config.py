"""``DistillationConfig``, ``load_distillation_config`` and names of layers, on stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, mock_open, patch

import pytest
import torch

from nemo.collections.llm.modelopt.distill import utils
from nemo.collections.llm.modelopt.distill.utils import DistillationConfig, load_distillation_config

MODULE = "nemo.collections.llm.modelopt.distill.utils"
PAIR = ["decoder.layers.3.input_layernorm", "decoder.layers.7.input_layernorm"]


def model_config(**given):
    """Return a configuration with what losses and projections read."""
    return SimpleNamespace(
        **{
            "pipeline_model_parallel_size": 1,
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "hidden_size": 8,
            "init_method": torch.nn.init.zeros_,
            **given,
        }
    )


@pytest.mark.drop_in
class TestDistillationConfig:
    def test_defaults(self):
        config = DistillationConfig()
        assert config.intermediate_layer_pairs == []
        assert config.logit_layers == ("output_layer", "output_layer")
        assert config.skip_lm_loss is True
        assert config.kd_loss_scale == 1.0
        assert config.criterion is None and config.loss_balancer is None

    @pytest.mark.parametrize("scale", [0, -1, -0.5])
    def test_the_scale_must_be_positive(self, scale):
        with pytest.raises(AssertionError, match=f"^self.kd_loss_scale={scale}"):
            DistillationConfig(kd_loss_scale=scale)

    @pytest.mark.parametrize("scale", [1, 0.5, 1e-3, 10])
    def test_scales(self, scale):
        assert DistillationConfig(kd_loss_scale=scale).kd_loss_scale == scale

    @pytest.mark.parametrize("layers", [(), ("output_layer",), ("a", "b", "c")])
    def test_two_layers_of_logits(self, layers):
        with pytest.raises(AssertionError, match="^self.logit_layers="):
            DistillationConfig(logit_layers=layers)

    @pytest.mark.parametrize("pairs", [[()], [("a",)], [("a", "b"), ("c",)], [("a", "b", "c", "d")]])
    def test_pairs_of_two_layers(self, pairs):
        with pytest.raises(AssertionError, match="^self.intermediate_layer_pairs="):
            DistillationConfig(intermediate_layer_pairs=pairs)

    @pytest.mark.parametrize("pair", [PAIR, tuple(PAIR)])
    def test_pairs_are_kept_as_they_are(self, pair):
        assert DistillationConfig(intermediate_layer_pairs=[pair]).intermediate_layer_pairs == [pair]

    @pytest.mark.parametrize("layers", [["output_layer", "lm_head"], ("output_layer", "lm_head")])
    def test_layers_of_logits_are_kept_as_they_are(self, layers):
        assert DistillationConfig(logit_layers=layers).logit_layers == layers

    def test_each_has_pairs_of_its_own(self):
        assert DistillationConfig().intermediate_layer_pairs is not DistillationConfig().intermediate_layer_pairs

    def test_an_unknown_setting(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
            DistillationConfig(nonsense=1)


class LoadCase:
    """Losses, projection and balancer are replaced."""

    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.parallel_state") as self.state,
            patch(f"{MODULE}.LogitsKLLoss") as self.logits,
            patch(f"{MODULE}.HiddenStateCosineLoss") as self.cosine,
            patch(f"{MODULE}.ProjectionLayer") as self.projection,
            patch(f"{MODULE}.LogitsAndIntermediatesLossBalancer") as self.balancer,
        ):
            self.state.is_pipeline_last_stage.return_value = True
            self.state.get_tensor_and_context_parallel_rank.return_value = 0
            yield


@pytest.mark.drop_in
class TestLoad(LoadCase):
    @pytest.mark.parametrize("path", [None, ""])
    def test_without_a_file(self, path):
        student, teacher = model_config(), model_config()
        config = load_distillation_config(path, student, teacher)
        assert isinstance(config, DistillationConfig)
        assert config.criterion == {("output_layer", "output_layer"): self.logits.return_value}
        assert config.loss_balancer is self.balancer.return_value
        self.logits.assert_called_once_with(student)
        self.balancer.assert_called_once_with(kd_loss_scale=1.0, skip_original_loss=True)

    def test_without_a_file_there_is_a_warning(self):
        with patch(f"{MODULE}.logging") as logging:
            load_distillation_config(None, model_config(), model_config())
        logging.warning.assert_called_once_with("Distillation config not provided. Using default.")

    def test_the_projection_is_made_once(self):
        student, teacher = model_config(), model_config(hidden_size=16)
        load_distillation_config(None, student, teacher)
        self.projection.assert_called_once_with(student, teacher)

    @pytest.mark.parametrize(
        "student",
        [
            SimpleNamespace(pipeline_model_parallel_size=1),
            MagicMock(pipeline_model_parallel_size=1),
            Mock(pipeline_model_parallel_size=1),
        ],
    )
    @pytest.mark.parametrize("teacher", [SimpleNamespace(), MagicMock(), Mock(), None])
    def test_only_what_is_read_of_the_models(self, student, teacher):
        config = load_distillation_config(None, student, teacher)
        assert list(config.criterion) == [("output_layer", "output_layer")]

    def test_a_file(self, tmp_path):
        path = tmp_path / "kd.yaml"
        path.write_text(
            "logit_layers: [output_layer, lm_head]\nskip_lm_loss: false\nkd_loss_scale: 2.5\n"
            "intermediate_layer_pairs:\n- [decoder.final_layernorm, decoder.final_layernorm]\n"
        )
        student = model_config()
        config = load_distillation_config(str(path), student, model_config())
        assert config.intermediate_layer_pairs == [["decoder.final_layernorm", "decoder.final_layernorm"]]
        assert config.logit_layers == ["output_layer", "lm_head"]
        self.balancer.assert_called_once_with(kd_loss_scale=2.5, skip_original_loss=False)
        assert config.criterion == {
            ("output_layer", "lm_head"): self.logits.return_value,
            ("decoder.final_layernorm", "decoder.final_layernorm"): self.cosine.return_value,
        }
        self.cosine.assert_called_once_with(student, projection_layer=self.projection.return_value)

    def test_a_file_that_is_a_path(self, tmp_path):
        path = tmp_path / "kd.yaml"
        path.write_text("kd_loss_scale: 3.0\n")
        assert load_distillation_config(path, model_config(), model_config()).kd_loss_scale == 3.0

    def test_a_file_that_is_a_mock(self):
        with patch("builtins.open", mock_open(read_data="skip_lm_loss: false\n")) as opened:
            config = load_distillation_config("/fake/kd.yaml", model_config(), model_config())
        assert str(opened.call_args.args[0]) == "/fake/kd.yaml"
        assert config.skip_lm_loss is False

    def test_the_parser_can_be_replaced(self):
        with patch("builtins.open", mock_open(read_data="")), patch(f"{MODULE}.yaml") as yaml:
            yaml.safe_load.return_value = {"kd_loss_scale": 7.0}
            config = load_distillation_config("/fake/kd.yaml", model_config(), model_config())
        assert config.kd_loss_scale == 7.0

    def test_the_parsers_function_can_be_replaced(self):
        with (
            patch("builtins.open", mock_open(read_data="")),
            patch(f"{MODULE}.yaml.safe_load", return_value={"skip_lm_loss": False}),
        ):
            config = load_distillation_config("/fake/kd.yaml", model_config(), model_config())
        assert config.skip_lm_loss is False

    def test_a_missing_file(self):
        with pytest.raises(FileNotFoundError, match="no-such-file.yaml"):
            load_distillation_config("/fake/no-such-file.yaml", model_config(), model_config())

    def test_an_unknown_setting(self):
        with (
            patch("builtins.open", mock_open(read_data="nonsense: 1\n")),
            pytest.raises(TypeError, match="nonsense"),
        ):
            load_distillation_config("/fake/kd.yaml", model_config(), model_config())

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("kd_loss_scale: 0", "^self.kd_loss_scale=0"),
            ("logit_layers: [a]", r"^self.logit_layers=\['a'\]"),
            ("intermediate_layer_pairs: [[a]]", r"^self.intermediate_layer_pairs=\[\['a'\]\]"),
        ],
    )
    def test_settings_of_a_file_are_checked(self, content, message):
        with patch("builtins.open", mock_open(read_data=content)), pytest.raises(AssertionError, match=message):
            load_distillation_config("/fake/kd.yaml", model_config(), model_config())


@pytest.mark.drop_in
class TestLoadInAPipeline(LoadCase):
    def load(self, content, student=None, teacher=None):
        with patch("builtins.open", mock_open(read_data=content)):
            return load_distillation_config("/fake/kd.yaml", student or model_config(), teacher or model_config())

    @pytest.mark.parametrize(
        "student", [SimpleNamespace(pipeline_model_parallel_size=2), Mock(pipeline_model_parallel_size=4)]
    )
    def test_no_losses_before_the_last_stage(self, student):
        self.state.is_pipeline_last_stage.return_value = False
        config = load_distillation_config(None, student, Mock())
        assert config.criterion == {}
        assert config.loss_balancer is self.balancer.return_value
        self.logits.assert_not_called()
        self.projection.assert_not_called()

    def test_losses_on_the_last_stage(self):
        config = load_distillation_config(None, SimpleNamespace(pipeline_model_parallel_size=2), Mock())
        assert list(config.criterion) == [("output_layer", "output_layer")]

    def test_without_a_pipeline_stages_are_not_asked_for(self):
        load_distillation_config(None, model_config(), model_config())
        self.state.is_pipeline_last_stage.assert_not_called()

    def test_layers_are_renamed(self):
        offsets = {1: 2, 2: 4}
        student, teacher = (
            model_config(pipeline_model_parallel_size=2, key=key, hidden_size=key * 8) for key in (1, 2)
        )
        with patch(f"{MODULE}.TransformerLayer") as layer:
            layer._get_layer_offset.side_effect = lambda config: offsets[config.key]
            config = self.load(f"intermediate_layer_pairs: [{PAIR}]", student, teacher)
        renamed = ("decoder.layers.1.input_layernorm", "decoder.layers.3.input_layernorm")
        assert config.criterion[renamed] is self.cosine.return_value
        assert config.intermediate_layer_pairs == [PAIR]

    def test_the_renaming_can_be_replaced(self):
        student, teacher = model_config(), model_config()
        with patch(f"{MODULE}._adjust_layer_index_for_pp", side_effect=["s", "t"]) as rename:
            config = self.load(f"intermediate_layer_pairs: [{PAIR}]", student, teacher)
        assert [asked.args for asked in rename.call_args_list] == [(PAIR[0], student), (PAIR[1], teacher)]
        assert set(config.criterion) == {("output_layer", "output_layer"), ("s", "t")}

    def test_pairs_share_a_projection(self):
        self.load("intermediate_layer_pairs: [[a, b], [c, d], [e, f]]")
        self.projection.assert_called_once()
        assert self.cosine.call_count == 3
        assert all(
            made.kwargs == {"projection_layer": self.projection.return_value} for made in self.cosine.call_args_list
        )

    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_mocks_of_models_with_pairs(self, mock_class):
        student = mock_class(pipeline_model_parallel_size=1)
        config = self.load("intermediate_layer_pairs: [[decoder.final_layernorm, x.y]]", student, mock_class())
        assert ("decoder.final_layernorm", "x.y") in config.criterion


@pytest.mark.drop_in
class TestLoadForReal:
    def test_default(self):
        config = load_distillation_config(None, model_config(), model_config())
        assert type(config.criterion["output_layer", "output_layer"]) is utils.LogitsKLLoss
        assert isinstance(config.loss_balancer, utils.LogitsAndIntermediatesLossBalancer)

    def test_with_a_pair(self):
        with (
            patch("builtins.open", mock_open(read_data="intermediate_layer_pairs: [[a.norm, b.norm]]")),
            patch(f"{MODULE}.parallel_state"),
        ):
            config = load_distillation_config("/fake/kd.yaml", model_config(), model_config(hidden_size=16))
        loss = config.criterion["a.norm", "b.norm"]
        assert type(loss) is utils.HiddenStateCosineLoss
        assert loss._projection._fit.weight.shape == (16, 8)

    @pytest.mark.parametrize(("scale", "skip"), [(1.0, True), (4.0, False)])
    def test_the_balancer_gets_the_settings(self, scale, skip):
        content = f"kd_loss_scale: {scale}\nskip_lm_loss: {str(skip).lower()}\n"
        with patch("builtins.open", mock_open(read_data=content)):
            config = load_distillation_config("/fake/kd.yaml", model_config(), model_config())
        assert config.loss_balancer._kd_loss_scale == scale
        assert config.loss_balancer._skip_original_loss is skip


@pytest.mark.drop_in
class TestLayerNames:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.TransformerLayer") as layer,
            patch(f"{MODULE}.parallel_state") as self.state,
        ):
            self.offset = layer._get_layer_offset
            self.offset.return_value = 4
            yield

    @pytest.mark.parametrize("name", ["decoder.final_layernorm", "output_layer", "layers_12.x", "12.decoder", ""])
    def test_names_without_an_index(self, name):
        assert utils._adjust_layer_index_for_pp(name, Mock()) == name
        self.offset.assert_not_called()

    @pytest.mark.parametrize(
        ("name", "renamed"),
        [
            ("decoder.layers.4.mlp", "decoder.layers.0.mlp"),
            ("decoder.layers.5.input_layernorm", "decoder.layers.1.input_layernorm"),
            ("decoder.layers.31.mlp.linear_fc2", "decoder.layers.27.mlp.linear_fc2"),
            ("a.10.b", "a.6.b"),
        ],
    )
    def test_the_index_is_moved(self, name, renamed):
        config = Mock()
        assert utils._adjust_layer_index_for_pp(name, config) == renamed
        self.offset.assert_called_once_with(config)

    def test_without_a_pipeline_names_stay(self):
        self.offset.return_value = 0
        assert utils._adjust_layer_index_for_pp("decoder.layers.3.mlp", Mock()) == "decoder.layers.3.mlp"

    @pytest.mark.parametrize("name", ["decoder.layers.0.mlp", "decoder.layers.3.x"])
    def test_layers_of_earlier_stages(self, name):
        with pytest.raises(ValueError, match=f"^Layer {name} does not fall on final PP rank"):
            utils._adjust_layer_index_for_pp(name, Mock())
