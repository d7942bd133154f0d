"""Hidden states at chosen positions, whatever inputs a family's encoder takes.

Teacher, student and evaluation ask for the masked positions, a seventh of all at 15 % masking, and
go through this one place, so that all of them see the same mask in the same way.

XLNet (Yang et al. 2019, arXiv:1906.08237) has no mask token in its input. A permutation says who
sees whom, and each predicted position has a query stream that knows where it is and not what is
there. Here the chosen positions come last in the permutation and none of them sees another: they
are hidden from everybody, and each is predicted from all others, to both sides. Its hidden state
is the output of the query stream, which the LM head was trained on. What stands at a chosen
position, mask, random or true token, makes no difference then.

Shapes: ``B`` sequences, ``L`` positions, ``N`` chosen positions of a batch, ``P`` the most chosen
positions of a sequence, ``D`` hidden width.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from distilcache.data.errors import require
from distilcache.stages.models.anatomy import in_evaluation, probe_ids
from distilcache.stages.models.families import family_of
from distilcache.stages.models.last_layer import filter_last_layer
from distilcache.stages.models.opened import run_norms_first


def model_class(config: Any) -> Any:
    """The class with an LM head for a configuration."""
    if config.model_type == "xlnet":  # its LM head is no masked LM's to transformers
        return transformers.XLNetLMHeadModel
    return transformers.AutoModelForMaskedLM


def from_config(config: Any) -> Any:
    """A model with random weights."""
    if config.model_type == "xlnet":
        return transformers.XLNetLMHeadModel(config)
    return run_norms_first(transformers.AutoModelForMaskedLM.from_config(config))


class RowEncoder:
    """The encoder of a masked LM, for some positions of a batch; differentiable.

    Args:
        model: A masked LM with its LM head. Where its last layer allows it, a filter is put into
            that, which does nothing unless this class is at work.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._permutes = family_of(model.config).mask == "permutation"
        self._filter = None if self._permutes else filter_last_layer(model)
        self._layers = int(model.config.num_hidden_layers)

    def __call__(
        self, ids_BL: Tensor, attention_BL: Tensor | None, rows_N: Tensor, most: int = 0
    ) -> Tensor:
        """The last layer's hidden states at flat positions, [N, D]: what the LM head reads.

        Args:
            ids_BL: Token ids.
            attention_BL: Where they are no padding, bool or int; None: nowhere.
            rows_N: Flat index of the chosen positions, ascending. For XLNet they are the masked
                positions, and all of them.
            most: XLNet: a bound for P, to save work; 0: not known.
        """
        return self.states(ids_BL, attention_BL, rows_N, (self._layers,), most)[0]

    def states(
        self,
        ids_BL: Tensor,
        attention_BL: Tensor | None,
        rows_N: Tensor,
        layers: tuple[int, ...],
        most: int = 0,
    ) -> list[Tensor]:
        """Hidden states of some layers, [N, D] each; 0 is the embeddings, n the last layer."""
        inputs = token_input(self._model, ids_BL, attention_BL)
        if any(layer != self._layers for layer in layers):
            inputs["output_hidden_states"] = True
        if self._permutes:
            inputs |= {"attention_mask": _floats(attention_BL), "use_mems": False}
            hidden, targets, index_N = permutation(ids_BL, rows_N, most)
            inputs |= {"perm_mask": hidden, "target_mapping": targets}
            output = self._model.base_model(**inputs)
            both = output.hidden_states or ()
            return [
                _pick(output.last_hidden_state if n == self._layers else both[2 * n + 1], index_N)
                for n in layers
            ]
        inputs["attention_mask"] = mask_input(self._model.config, ids_BL, attention_BL)
        if self._filter is None:
            output = self._model.base_model(**inputs)
            last = _pick(output.last_hidden_state, rows_N)
        else:
            self._filter.rows_N = rows_N
            try:
                output = self._model.base_model(**inputs)
            finally:
                self._filter.rows_N = None
            last = output.last_hidden_state[0]
        inner = states_of(output)
        return [
            last if n == self._layers else self._inner(inner, n, ids_BL, rows_N) for n in layers
        ]

    def _inner(self, states: Any, n: int, ids_BL: Tensor, rows_N: Tensor) -> Tensor:
        require(
            n < len(states) and states[n].shape[:2] == ids_BL.shape,
            f"cache: hidden_layers must be -1 for a teacher of type "
            f"{self._model.config.model_type!r}, got {n}; it has no states of each position there",
        )
        return _pick(states[n], rows_N)


def states_of(output: Any) -> Any:
    """Hidden states of all layers [B, L, D], where ``output_hidden_states`` asked for them.

    Of a decoder, where there is one.
    """
    return output.get("hidden_states") or output.get("decoder_hidden_states")


def own_logits(model: Any, ids_BL: Tensor, attention_BL: Tensor | None, rows_N: Tensor) -> Tensor:
    """Logits [N, V] at the masked positions as the model itself computes them, head and all.

    LM heads work position by position under different names in every family. Cutting the encoder's
    output down to the masked rows on its way to the head therefore gives the same logits for any
    of them, known or not, without the B x L x V that a plain forward pass would hold.

    Args:
        model: A masked LM, or XLNet, which predicts as the module says.
        ids_BL: Token ids.
        attention_BL: Where they are no padding, int; None: nowhere.
        rows_N: Flat index of the masked positions, ascending.
    """
    if family_of(model.config).mask == "permutation":
        hidden, targets, index_N = permutation(ids_BL, rows_N)
        mask = _floats(attention_BL)
        output = model(
            ids_BL, mask, perm_mask=hidden, target_mapping=targets, use_mems=False, return_dict=True
        )
        return _pick(output.logits, index_N)
    cut: list[bool] = []

    def keep_rows(_: nn.Module, __: Any, output: Any) -> Any:
        rows_1ND = _pick(output[0], rows_N)[None]
        cut.append(True)
        if isinstance(output, tuple):
            return (rows_1ND, *output[1:])
        output["last_hidden_state"] = rows_1ND
        return output

    handle = model.base_model.register_forward_hook(keep_rows)
    try:
        tokens = token_input(model, ids_BL, attention_BL)
        output = model(**tokens, attention_mask=attention_BL, return_dict=True)
    finally:
        handle.remove()
    # A family whose model does not call its encoder as a module gives all positions.
    return output.logits.flatten(0, 1) if cut else _pick(output.logits, rows_N)


def unused_parameters(model: Any) -> list[str]:
    """Parameters that no logit depends on, such as XLNet's that tell segments apart.

    Ranks that train together would wait for their gradients.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*trained, strict=True)
    ids_BL = probe_ids(model)
    rows_N = torch.arange(1, ids_BL.numel(), 3, device=ids_BL.device)
    with in_evaluation(model), torch.enable_grad():
        logits_NV = own_logits(model, ids_BL, torch.ones_like(ids_BL), rows_N)
        used = torch.autograd.grad(logits_NV.sum(), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, used, strict=True) if gradient is None]


def token_input(model: Any, ids_BL: Tensor, attention_BL: Tensor | None) -> dict[str, Any]:
    """The argument that holds the tokens.

    MobileBERT adds the embeddings of both neighbours to each token's. Beside padding these are
    zeros here, as at the end of a sequence without padding: what a sequence gives must not depend
    on how long others of its batch are.
    """
    if attention_BL is None or not getattr(model.config, "trigram_input", False):
        return {"input_ids": ids_BL}
    embedded_BLD = model.get_input_embeddings()(ids_BL)
    return {"inputs_embeds": embedded_BLD * attention_BL.to(embedded_BLD.dtype)[..., None]}


def mask_input(config: Any, ids_BL: Tensor, attention_BL: Tensor | None) -> Any:
    """What a model takes as ``attention_mask``, so that it need not wait for a device.

    Of a mask with two axes transformers asks whether it masks anything, for which the host would
    wait; one of four axes it takes as it is. Not for XLNet.
    """
    kind = family_of(config).mask
    if kind == "tokens":  # without a mask it would look for padding
        return torch.ones_like(ids_BL) if attention_BL is None else attention_BL.long()
    if attention_BL is None:
        return None
    there_BL = attention_BL.bool()
    keys = there_BL[:, None, None]
    if kind == "keys":
        return keys
    place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    near_LL = (place_L[:, None] - place_L).abs() <= config.sliding_window
    # Padding may look everywhere: a row that sees nothing would become nan.
    window = (keys & near_LL) | ~there_BL[:, None, :, None]
    return {"full_attention": keys, "sliding_attention": window}


def permutation(ids_BL: Tensor, rows_N: Tensor, most: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """XLNet's inputs that hide the chosen positions from all and predict each from the others.

    Returns:
        ``perm_mask`` [B, L, L], 1 where a position may not look; ``target_mapping`` [B, P, L], 1
        at the p-th chosen position of a sequence; and where the chosen positions then lie in the
        flattened [B, P], [N].
    """
    sequences, length = ids_BL.shape
    hidden = torch.zeros(ids_BL.numel(), device=ids_BL.device).index_fill(0, rows_N, 1.0)
    hidden_BL = hidden.view(sequences, length)
    if ids_BL.device.type == "cpu":  # elsewhere the host would wait for the number
        most = int(hidden_BL.sum(1).max())
    width = min(most, length) if most else length
    sequence_N = rows_N // length
    rank_N = hidden_BL.cumsum(1).flatten()[rows_N].long() - 1
    index_N = sequence_N * width + rank_N
    targets = torch.zeros(sequences * width * length, device=ids_BL.device)
    targets = targets.index_fill(0, index_N * length + rows_N % length, 1.0)
    perm_mask = hidden_BL[:, None].expand(sequences, length, length)
    return perm_mask, targets.view(sequences, width, length), index_N


def _pick(states_BLD: Tensor, rows_N: Tensor) -> Tensor:
    return states_BLD.flatten(0, 1).index_select(0, rows_N)


def _floats(attention_BL: Tensor | None) -> Tensor | None:
    return None if attention_BL is None else attention_BL.float()
