import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pruneattn

KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
TABLE_2 = {  # frames: GMACs of one clip by keep-rate
    128: (5.6, 4.9, 4.30, 3.7, 3.3, 2.8, 2.5),
    512: (23.1, 20.0, 17.3, 15.0, 13.1, 11.4, 10.0),
    1024: (48.6, 41.8, 36.0, 31.1, 27.1, 23.7, 20.8),
}


def table_errors(name, frames):
    with torch.device("meta"):
        model = pruneattn.create_model(name, frames=frames)
    errors = []
    for keep_rate, expected in zip(KEEP_RATES, TABLE_2[frames], strict=True):
        errors.append(abs(pruneattn.count_macs(model, keep_rate).paper / 1e9 - expected))
    return errors


@pytest.mark.parametrize("frames", TABLE_2)
def test_table_2(frames):
    assert max(table_errors("audiomae_base", frames)) < 0.1
    # The table was counted with one extra token; AST's second extra token adds up to 0.1.
    assert max(table_errors("ast_base", frames)) < 0.2


@pytest.mark.parametrize("keep_rate", [1.0, 0.6, (0.5, 1.0, 0.01)])
@pytest.mark.parametrize("score", ["column_mean", "cls", "intensity", "variation", "random", "function"])
@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_computed_equals_the_products_that_run(make_model, family, score, keep_rate):
    if score == "function":  # contains no matrix product, because the work of a custom score is not counted

        def score(q, k, v, extra_tokens):
            return v.mean(dim=(1, 3))[:, extra_tokens:]

    model = make_model(family, score=score, keep_rate=keep_rate)
    macs = pruneattn.count_macs(model)
    # The plain form of SDPA consists of products that the counter supports on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 128, 128))
    assert counter.get_total_flops() == 2 * 3 * macs.computed


def test_blocks_add_up(make_model):
    model = make_model("audiomae", keep_rate=0.5)
    macs = pruneattn.count_macs(model)
    assert len(macs.blocks) == 10 and all(isinstance(value, int) for pair in macs.blocks for value in pair)
    assert macs.paper == sum(paper for paper, _ in macs.blocks) + 64 * 256 * 24
    assert macs.computed == sum(computed for _, computed in macs.blocks) + 64 * 256 * 24 + 24 * 5
    for i, (paper, computed) in enumerate(macs.blocks):
        assert computed < paper if i in (3, 6, 9) else computed == paper


def test_computed_never_exceeds_the_paper_by_more_than_the_head(make_model):
    for family in ("audiomae", "ast"):
        for score in ("column_mean", "cls", "intensity"):
            model = make_model(family, score=score)
            for keep_rate in KEEP_RATES:
                macs = pruneattn.count_macs(model, keep_rate)
                assert macs.computed <= macs.paper + 24 * 5


@pytest.mark.parametrize("keep_rate", [1.0, 0.6, (0.5, 1.0, 0.01), [0.9, 0.8, 0.7]])
def test_counting_at_a_keep_rate_equals_counting_after_setting_it(make_model, keep_rate):
    model, at_that_rate = make_model("ast", keep_rate=0.5), make_model("ast", keep_rate=keep_rate)
    assert pruneattn.count_macs(model, keep_rate) == pruneattn.count_macs(at_that_rate)
    assert pruneattn.count_macs(model, keep_rate) != pruneattn.count_macs(model)


def test_counting_at_a_keep_rate_does_not_change_the_model(make_model):
    model = make_model("ast", keep_rate=(0.5, 0.6, 0.7))
    before = {name: id(value) for name, value in vars(model).items()}
    expected = pruneattn.count_macs(model)
    pruneattn.count_macs(model, keep_rate=0.3)
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert model.keep_rates == (0.5, 0.6, 0.7) and pruneattn.count_macs(model) == expected


@pytest.mark.parametrize("keep_rate", [0, 1.5, float("nan"), "half", (0.5, 0.5), (0.5, 0.5, 0), object()])
def test_an_invalid_keep_rate_is_rejected_as_in_set_keep_rate(make_model, keep_rate):
    model = make_model("ast", keep_rate=0.5)
    messages = []
    for function in (model.set_keep_rate, lambda rate: pruneattn.count_macs(model, rate)):
        with pytest.raises(pruneattn.UserError, match="^keep_rate: ") as error:
            function(keep_rate)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and model.keep_rates == (0.5,) * 3


def test_without_pruning_blocks_only_a_keep_rate_of_1_can_be_counted(make_model):
    model = make_model("ast", prune_blocks=())
    assert pruneattn.count_macs(model, 1.0) == pruneattn.count_macs(model)
    with pytest.raises(pruneattn.UserError, match="keep_rate: 0.5 needs pruning blocks"):
        pruneattn.count_macs(model, 0.5)
