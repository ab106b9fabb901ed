"""The trained weights of a generation checkpoint, under the names all formats give them."""

from torch import Tensor, nn

from model.config import QFormerConfig
from model.parts import Blip2Parts
from model.qformer import QFormer, build_query_tokens


class QueryBranch(nn.Module):
    """What stands between image features and language model; a place to load weights into."""

    def __init__(self, config: QFormerConfig, *, language_model_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=layer_norm_eps)
        self.query_tokens = build_query_tokens(config)
        self.qformer = QFormer(config, has_text_branch=False)
        self.language_projection = nn.Linear(config.hidden_size, language_model_size)


def query_branch_tensors(parts: Blip2Parts) -> dict[str, Tensor]:
    """Gives the same weights of a built model, under the same names."""
    assert parts.language_projection is not None, "a retrieval-only model has no generation weights"
    modules = {
        "ln_vision": parts.ln_vision,
        "qformer": parts.qformer,
        "language_projection": parts.language_projection,
    }
    tensors: dict[str, Tensor] = {"query_tokens": parts.query_tokens}
    for name, module in modules.items():
        tensors.update({f"{name}.{key}": value for key, value in module.state_dict().items()})
    return tensors
