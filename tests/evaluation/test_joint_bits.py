import math

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig

from bae_lens import BAE, BAEConfig, compress
from bae_lens.evaluation import joint_bits
from bae_lens.evaluation.joint_bits import JointBits
from bae_lens.functional.geometric_prior import geometric_bits


def entropy(p):
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def bits_of(sae, *batches):
    counter = JointBits(sae)
    for batch in batches:
        counter.add(batch)
    return counter.bits


def without_geometry(d_sae: int) -> Transcoder:
    return Transcoder(TranscoderConfig(d_in=3, d_out=2, d_sae=d_sae, apply_b_dec_to_input=False))


def test_two_features_that_are_the_same_cost_one():
    coin = (torch.rand(4096, 1) < 0.5).float()
    bits = bits_of(without_geometry(2), coin.repeat(1, 2))
    # the coin itself, and each feature's parent in log2(3) bits and its one or two rates in 7
    assert bits == pytest.approx(4096 + 2 * math.log2(3) + 3 * math.log2(115), rel=2e-3)


def test_many_features_that_say_little_of_each_other_are_coded_alone():
    code = torch.eye(4).repeat(1, 256)  # 3.2 bits that two of them share do not pay for a rate
    assert bits_of(without_geometry(1024), code) == pytest.approx(1024 * (4 * entropy(1 / 4) + 16))


def test_values_count_as_bits_do():
    values = torch.randn(500, 8).relu() * (torch.rand(500, 8) < 0.3)
    sae = without_geometry(8)
    assert bits_of(sae, values) == bits_of(sae, (values != 0).float())
    assert bits_of(sae, -values) == bits_of(sae, values)


def test_batches_are_cut_as_a_file_cuts_them(monkeypatch):
    code, sae = (torch.rand(1000, 16) < 0.2).float(), without_geometry(16)
    code[:, 8:] *= code[:, :8]
    whole = bits_of(sae, code)
    assert bits_of(sae, *code.split(7)) == whole
    chunks = sum(bits_of(sae, part) for part in code.split([300, 300, 400]))
    monkeypatch.setattr(joint_bits, "CHUNK_ROWS", 300)
    assert bits_of(sae, *code.split(7)) == pytest.approx(chunks)


def test_they_are_what_a_file_takes(identity_bae, tmp_path):
    code = (torch.rand(20_000, 24) < 0.1).float()
    code[:, 12:] *= code[:, :12]
    report = compress(identity_bae(24), code, tmp_path / "code.bae")
    sae = BAE(BAEConfig(d_in=24, d_sae=24))
    sae.W_enc.data.zero_()  # geometry that says nothing
    assert bits_of(sae, code) / len(code) == pytest.approx(report.bits, rel=0.01)


def test_geometry_counts_where_it_takes_less():
    # Ten coins and a feature that fires if most of them do, which follows from what they decode to: 10 bits, and side
    # information.
    sae = StandardSAE(StandardSAEConfig(d_in=1, d_sae=11, apply_b_dec_to_input=False))
    sae.W_enc.data.copy_(torch.eye(11)[-1:])
    sae.W_dec.data.fill_(1)
    coins = (torch.arange(2**10)[:, None] >> torch.arange(10) & 1).repeat(8, 1)
    code = torch.cat([coins, coins.sum(1, keepdim=True) > 5], dim=1).float()
    geometric = geometric_bits(code, sae.W_enc, sae.W_dec)
    assert bits_of(sae, code) == pytest.approx(geometric.total * len(code), rel=1e-9)
    assert geometric.joint == pytest.approx(10, abs=0.05)
    # Along a tree each coin shares with the majority, which fires in 386 of 1024 vectors, what alone it says of it.
    fires = sum(math.comb(10, k) for k in range(6, 11))
    with_coin = sum(math.comb(9, k) for k in range(5, 10))
    majority, given_coin = entropy(fires / 1024), (entropy(with_coin / 512) + entropy((fires - with_coin) / 512)) / 2
    along_tree = 10 + majority - 10 * (majority - given_coin)
    side = 11 * math.log2(12) + 21 * math.log2(115)
    assert bits_of(without_geometry(11), code) == pytest.approx(along_tree * len(code) + side, rel=1e-9)
    assert 10.4 < along_tree < 10 + majority


def test_nothing_costs_nothing():
    assert JointBits(without_geometry(4)).bits == 0
    assert bits_of(without_geometry(4), torch.zeros(0, 4)) == 0
