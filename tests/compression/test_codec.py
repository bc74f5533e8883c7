import json
import re

import numpy as np
import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import save_file

from bae_lens import (
    BAE,
    BAEConfig,
    BinaryTranscoder,
    BinaryTranscoderConfig,
    TrainingBAE,
    TrainingBAEConfig,
    compress,
    decompress,
    read_code,
)
from bae_lens.compression import code_file, codec
from bae_lens.compression.codec import CompressionReport, fingerprint
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.packing import pack_code


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(codec, "ROWS", 32)
    monkeypatch.setattr(code_file, "CHUNK_ROWS", 100)


@pytest.fixture
def bae():
    return random_bae()


@pytest.fixture
def vectors():
    return torch.randn(330, 16) + 3


class Signs(torch.nn.Linear):
    """Not a dictionary of SAELens, but one that encodes and decodes."""

    def encode(self, x):
        return (x > 3).float()

    def decode(self, feature_acts):
        return self(feature_acts)


def random_bae(seed=0, **config):
    torch.manual_seed(seed)
    bae = BAE(BAEConfig(d_in=16, d_sae=50, **config))
    for name, weights in bae.named_parameters():
        torch.nn.init.normal_(weights, -3.0 if name == "b_enc" else 0.0, 0.5)
    return bae


def test_code_and_reconstruction_come_back(bae, vectors, tmp_path):
    report = compress(bae, vectors, tmp_path / "x.bae")
    code = bae.encode(vectors)
    assert torch.equal(read_code(tmp_path / "x.bae"), code)
    assert torch.equal(read_code(tmp_path / "x.bae", packed=True), pack_code(code))
    torch.testing.assert_close(decompress(tmp_path / "x.bae", bae), bae.decode(code))
    assert report.n_vectors == 330
    assert (report.d_in, report.d_sae) == (16, 50)


def test_report_by_hand(identity_bae, tmp_path):
    vectors = torch.tensor([[1.0, 0.25], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    report = compress(identity_bae(2), vectors, tmp_path / "x.bae")
    # Rates 1/2 and 1/4; squared error 1/16; squared distance to the mean 1 + 17/16 - 25/64.
    assert report.entropy_bits == pytest.approx(1 + marginal_entropy(torch.tensor([0.25])).item())
    assert report.explained_variance == pytest.approx(1 - (1 / 16) / (1 + 17 / 16 - 25 / 64))
    assert report.relative_error == pytest.approx(((1 / 16) / (3 + 1 / 16)) ** 0.5)
    assert report.n_bytes == (tmp_path / "x.bae").stat().st_size
    assert report.bits == 2 * report.n_bytes
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_report_of_vectors_far_from_the_origin(identity_bae, tmp_path):
    bae = identity_bae(2)
    bae.b_dec.data += 1e6
    bae.b_enc.data -= 1e6
    vectors = 1e6 + torch.tensor([[1.0, 0.25], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    report = compress(bae, vectors, tmp_path / "x.bae")
    assert report.explained_variance == pytest.approx(1 - (1 / 16) / (1 + 17 / 16 - 25 / 64), rel=1e-6)


def test_report_does_not_depend_on_the_batches(bae, vectors, tmp_path):
    vectors[200:] += 5
    whole, parts = (compress(bae, x, tmp_path / "x.bae") for x in (vectors, vectors.split(70)))
    assert parts.explained_variance == pytest.approx(whole.explained_variance)
    unexplained = (bae(vectors) - vectors).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert whole.explained_variance == pytest.approx(1 - unexplained.item(), rel=1e-4)


def test_vectors_without_variance_have_no_share_of_it(identity_bae, tmp_path):
    report = compress(identity_bae(2), torch.zeros(5, 2), tmp_path / "x.bae")
    assert report.explained_variance is None
    assert report.relative_error is None


def test_size_is_entropy_and_side_information(tmp_path, monkeypatch, identity_bae):
    monkeypatch.setattr(code_file, "CHUNK_ROWS", 16_384)
    rates = torch.rand(64) / 5
    vectors = (torch.rand(20_000, 64) < rates).float()
    report = compress(identity_bae(64), vectors, tmp_path / "x.bae", joint=False)
    side_information = 2 * 64 + 40 + 64
    assert 8 * (report.n_bytes - side_information) / 20_000 == pytest.approx(report.entropy_bits, rel=0.01)


def test_features_that_belong_together_take_fewer_bits(tmp_path, monkeypatch, identity_bae):
    monkeypatch.setattr(code_file, "CHUNK_ROWS", 10_000)
    vectors = (torch.rand(20_000, 32) < torch.rand(32) / 5).repeat_interleave(2, dim=1).float()
    bae = identity_bae(64)
    alone, joint = (compress(bae, vectors, tmp_path / f"{joint}.bae", joint=joint) for joint in (False, True))
    assert torch.equal(read_code(tmp_path / "True.bae"), vectors)
    assert alone.entropy_bits == joint.entropy_bits
    assert alone.joint_bits == pytest.approx(alone.entropy_bits, rel=1e-3)  # of chunks with rates of their own
    assert joint.joint_bits == pytest.approx(joint.entropy_bits / 2, rel=1e-3)  # of each two the second is known
    assert joint.joint_bits is not None
    assert joint.joint_bits < joint.bits < 1.05 * joint.joint_bits


def test_joint_bits_of_an_append_are_its_own(tmp_path, monkeypatch, identity_bae):
    monkeypatch.setattr(code_file, "CHUNK_ROWS", 1000)
    bae, coins = identity_bae(16), (torch.rand(1000, 8) < 0.5).float()
    compress(bae, coins.repeat(1, 2), tmp_path / "x.bae")
    report = compress(bae, torch.cat([coins, coins.flip(0)], dim=1), tmp_path / "x.bae", append=True)
    assert report.joint_bits == pytest.approx(16, abs=0.2)


def test_reports_of_versions_without_joint_bits_are_read():
    values = {"n_vectors": 1, "d_in": 2, "d_sae": 3, "n_bytes": 4, "entropy_bits": 5.0}
    report = CompressionReport.from_dict({**values, "explained_variance": None, "relative_error": None})
    assert report.joint_bits is None


def sources(vectors, folder):
    np.save(folder / "x.npy", vectors.numpy())
    save_file({"x": vectors}, folder / "x.safetensors")
    torch.save(vectors, folder / "x.pt")
    return {
        "array": vectors.numpy(),
        "memory-mapped array": np.load(folder / "x.npy", mmap_mode="r"),
        "npy": folder / "x.npy",
        "npy by name": str(folder / "x.npy"),
        "pt": folder / "x.pt",
        "safetensors": folder / "x.safetensors",
        "batches": iter(vectors.split(77)),
        "arrays": iter(np.split(vectors.numpy(), [3, 300])),
        "batches without vectors": [vectors[:0], vectors, torch.zeros(3, 0, 16)],
        "contexts": vectors.view(33, 10, 16),
        "one long context": vectors[None],
        "transposed": vectors.T.contiguous().T,
        "transposed contexts": vectors.view(33, 10, 16).transpose(0, 1).contiguous().transpose(0, 1),
        "double": vectors.double(),
        "another byte order": vectors.numpy().astype(">f4"),
        "requires a gradient": vectors.clone().requires_grad_(),
    }


def test_every_kind_of_vectors(bae, vectors, tmp_path):
    for name, source in sources(vectors, tmp_path).items():
        report = compress(bae, source, tmp_path / "x.bae")
        assert report.n_vectors == 330, name
        assert torch.equal(read_code(tmp_path / "x.bae"), bae.encode(vectors)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.uint16])
def test_vectors_of_other_types(identity_bae, tmp_path, dtype):
    vectors = torch.randint(0, 2, (50, 9)).to(dtype)
    report = compress(identity_bae(9), vectors, tmp_path / "x.bae")
    assert torch.equal(read_code(tmp_path / "x.bae"), vectors.float())
    assert report.explained_variance == 1


def test_one_feature_and_one_vector(identity_bae, tmp_path):
    bae = identity_bae(1)
    for x in ([[1.0]], [[0.0]], [[1.0], [0.0]]):
        report = compress(bae, torch.tensor(x), tmp_path / "x.bae")
        assert torch.equal(decompress(tmp_path / "x.bae", bae), torch.tensor(x))
        assert report.entropy_bits == len(x) - 1


def test_hook_z(tmp_path):
    bae = random_bae(reshape_activations="hook_z")
    z = torch.randn(70, 2, 8) + 3
    code = bae.encode(z)
    for vectors in (z, z.view(7, 10, 2, 8), z.flatten(1), z.numpy(), [z[:30], z[30:].flatten(1)]):
        report = compress(bae, vectors, tmp_path / "x.bae")
        assert (report.n_vectors, report.d_in) == (70, 16)
        assert torch.equal(read_code(tmp_path / "x.bae"), code)
    fresh = BAE.from_dict(bae.cfg.to_dict())
    fresh.load_state_dict(bae.state_dict())
    torch.testing.assert_close(decompress(tmp_path / "x.bae", fresh), bae.decode(code).flatten(1))
    assert bae.hook_z_reshaping_mode
    assert fresh.hook_z_reshaping_mode


def test_hidden_states(states, tmp_path):
    train, _ = states
    compress(random_bae(), train.batches(64), tmp_path / "x.bae")
    assert torch.equal(read_code(tmp_path / "x.bae"), random_bae().encode(train.rows(train.content)))


def test_batches_are_taken_and_written_one_at_a_time(bae, vectors, tmp_path):
    """So that memory does not grow with them."""
    written = []

    def batches():
        for batch in vectors.split(30):
            partial = tmp_path / "x.bae.partial"
            written.append(partial.stat().st_size if partial.exists() else 0)
            yield batch

    compress(bae, batches(), tmp_path / "x.bae")
    chunk = 40 + 2 * 50
    assert written[:7] == [0, *[64] * 6]  # fewer than 200 vectors, which make no chunk yet
    assert all(size > 64 + chunk for size in written[7:])


def test_any_module_that_encodes_and_decodes(vectors, tmp_path):
    signs = Signs(16, 16)
    compress(signs, vectors, tmp_path / "x.bae")
    assert torch.equal(read_code(tmp_path / "x.bae"), (vectors > 3).float())
    torch.testing.assert_close(decompress(tmp_path / "x.bae", signs), signs((vectors > 3).float()).detach())


@pytest.mark.parametrize("rows", [slice(0, 10), slice(95, 205), slice(330, 330), slice(100, None)])
def test_ranges(bae, vectors, tmp_path, rows):
    compress(bae, vectors, tmp_path / "x.bae")
    code = bae.encode(vectors)[rows]
    assert torch.equal(read_code(tmp_path / "x.bae", rows), code)
    torch.testing.assert_close(decompress(tmp_path / "x.bae", bae, rows), bae.decode(code))


def test_range_beyond_the_end(bae, vectors, tmp_path):
    compress(bae, vectors, tmp_path / "x.bae")
    for read in (
        lambda rows: read_code(tmp_path / "x.bae", rows),
        lambda rows: decompress(tmp_path / "x.bae", bae, rows),
    ):
        with pytest.raises(ValueError, match=r"the 330 vectors in .*x\.bae, got 300:331"):
            read(slice(300, 331))


def test_append(bae, vectors, tmp_path):
    first = compress(bae, vectors[:130], tmp_path / "x.bae")
    second = compress(bae, vectors[130:], tmp_path / "x.bae", append=True)
    assert torch.equal(read_code(tmp_path / "x.bae"), bae.encode(vectors))
    assert (first.n_vectors, second.n_vectors) == (130, 200)
    assert first.n_bytes + second.n_bytes == (tmp_path / "x.bae").stat().st_size


def test_another_dictionary_names_both(bae, vectors, tmp_path):
    compress(bae, vectors, tmp_path / "x.bae")
    other = random_bae(seed=1)
    both = f"{fingerprint(bae).hex()}.*{fingerprint(other).hex()}"
    with pytest.raises(ValueError, match=both):
        decompress(tmp_path / "x.bae", other)
    with pytest.raises(ValueError, match=both):
        compress(other, vectors, tmp_path / "x.bae", append=True)
    assert torch.equal(read_code(tmp_path / "x.bae"), bae.encode(vectors))


def test_fingerprint_is_of_what_makes_the_code(bae, vectors, tmp_path):
    original = fingerprint(bae)
    assert re.fullmatch("[0-9a-f]{32}", original.hex())
    bae.estimate_prior(vectors)
    bae.cfg.metadata.hook_name = "elsewhere"
    bae.save_model(tmp_path / "bae")
    assert fingerprint(BAE.load_from_disk(tmp_path / "bae")) == original
    for name, weights in bae.named_parameters():
        value = weights.data.flatten()[0].item()
        weights.data.flatten()[0] += 1e-3
        assert fingerprint(bae) != original, name
        weights.data.flatten()[0] = value
    assert fingerprint(bae) == original
    assert fingerprint(bae.to(torch.bfloat16)) != original


def test_fingerprint_is_of_shapes_too():
    wide, tall = (Signs(*shape, bias=False) for shape in ((4, 2), (2, 4)))
    for layer in (wide, tall):
        layer.weight.data.zero_()
    assert fingerprint(wide) != fingerprint(tall)


def test_file_of_a_dictionary_in_training_opens_with_the_trained_one(vectors, tmp_path):
    training = TrainingBAE(TrainingBAEConfig(d_in=16, d_sae=50))
    compress(training, vectors, tmp_path / "x.bae")
    bae = BAE(BAEConfig(d_in=16, d_sae=50))
    bae.load_state_dict({name: training.state_dict()[name] for name in bae.state_dict()})
    torch.testing.assert_close(decompress(tmp_path / "x.bae", bae), bae.decode(bae.encode(vectors)))


def test_bfloat16(vectors, tmp_path):
    bae = random_bae().to(torch.bfloat16)
    compress(bae, vectors, tmp_path / "x.bae")
    back = decompress(tmp_path / "x.bae", bae)
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back, bae.decode(bae.encode(vectors.to(torch.bfloat16))))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_sparse_codes_of_other_dictionaries_are_refused_like_dense_ones(vectors, tmp_path):
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=50, k=4, use_sparse_activations=True))
    with pytest.raises(ValueError, match="only a binary code"):
        compress(sae, vectors, tmp_path / "x.bae")


def test_damaged_chunk(bae, vectors, tmp_path):
    path = tmp_path / "x.bae"
    compress(bae, vectors, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="vectors 200 to 329 is damaged"):
        decompress(path, bae)
    assert len(decompress(path, bae, slice(0, 200))) == 200
    with pytest.warns(UserWarning, match="1 damaged chunks are left out, vectors 200 to 329"):
        assert torch.equal(read_code(path, skip_damaged=True), bae.encode(vectors[:200]))
    with pytest.warns(UserWarning, match="1 damaged chunks are left out, vectors 200 to 329"):
        assert len(decompress(path, bae, skip_damaged=True)) == 200


def test_what_cannot_be_compressed(bae, vectors, tmp_path):
    bad = vectors.clone()
    bad[40, 3] = float("nan")
    transcoder = BinaryTranscoder(BinaryTranscoderConfig(d_in=16, d_sae=50, d_out=16))
    refused = {
        "no vectors": (bae, torch.zeros(0, 16)),
        "at least 2 axes": (bae, torch.zeros(16)),
        "must be finite": (bae, bad),
        "16 wide": (bae, torch.zeros(5, 17)),
        "only a binary code": (bae.to_graded_sae(), vectors),
        "a transcoder's code does not stand for its input": (transcoder, vectors),
        "does not hold the norms": (random_bae(normalize_activations="layer_norm"), vectors),
        "got torch.complex64": (bae, vectors.to(torch.complex64)),
        "got torch.bool": (bae, vectors > 3),
        "no numbers that torch knows": (bae, np.full((3, 16), None)),
        "got a list": (bae, iter(vectors.tolist())),
        "too much for torch.float32": (bae, vectors.double() * 1e300),
    }
    for message, (sae, x) in refused.items():
        with pytest.raises(ValueError, match=message):
            compress(sae, x, tmp_path / "x.bae")
    assert list(tmp_path.iterdir()) == []


def geometric_bae():
    """A dictionary whose features tell of each other."""
    torch.manual_seed(0)
    bae = BAE(BAEConfig(d_in=16, d_sae=50))
    bae.W_dec.data = torch.randn(50, 16)
    bae.W_enc.data, bae.b_enc.data[:] = bae.W_dec.data.T.clone(), -22.0
    return bae


def test_bits_that_the_geometry_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(code_file, "CHUNK_ROWS", 16_384)
    bae, vectors = geometric_bae(), 3 * torch.randn(3000, 16)
    report = compress(bae, vectors, tmp_path / "x.bae")
    assert report.codings == {"geometry": 1}
    assert report.joint_bits is not None
    assert report.joint_bits < 0.9 * report.entropy_bits
    assert torch.equal(read_code(tmp_path / "x.bae", sae=bae), bae.encode(vectors))
    assert torch.equal(read_code(tmp_path / "x.bae", slice(7, 9), sae=bae), bae.encode(vectors[7:9]))
    torch.testing.assert_close(decompress(tmp_path / "x.bae", bae), bae.decode(bae.encode(vectors)))
    with pytest.raises(ValueError, match=rf"by the geometry of its dictionary.*{fingerprint(bae).hex()} as sae"):
        read_code(tmp_path / "x.bae")
    with pytest.raises(ValueError, match="was made by the dictionary"):
        read_code(tmp_path / "x.bae", sae=random_bae())


def test_geometry_of_weights_in_bfloat16(tmp_path):
    bae, vectors = geometric_bae().to(torch.bfloat16), 3 * torch.randn(2000, 16)
    compress(bae, vectors, tmp_path / "x.bae")
    assert torch.equal(read_code(tmp_path / "x.bae", sae=bae), bae.encode(vectors.bfloat16()).float())


def test_dictionaries_without_geometry(tmp_path, monkeypatch, vectors):
    bae = geometric_bae()
    unknown = Signs(16, 16)
    infinite, wide = geometric_bae(), geometric_bae()
    infinite.W_dec.data[0, 0] = torch.inf
    assert codec._geometry(bae) is not None
    assert codec._geometry(unknown) is None
    assert codec._geometry(infinite) is None
    monkeypatch.setattr(codec, "MOST_FEATURES", 49)
    assert codec._geometry(wide) is None
    report = compress(wide, vectors, tmp_path / "x.bae")
    assert set(report.codings or {}) <= {"pairs", "columns"}
    assert torch.equal(read_code(tmp_path / "x.bae"), wide.encode(vectors))
