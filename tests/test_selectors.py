"""Ways to choose that train nothing, against definitions, libraries and FLOPs by hand: hyma/selectors.py and its files."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from helpers import CPU, make_embedding_folder
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from hyma.alignment import calibrated_cka, canonical_correlations, debiased_cka, linear_cka, mutual_neighbours
from hyma.costs import flop_counter
from hyma.embeddings import Embeddings
from hyma.gromov_wasserstein import ENTROPY, UPDATES, gromov_wasserstein
from hyma.metrics import Retrieval
from hyma.probes import relative_representations, ridge_probe
from hyma.selectors import centred_features, selector_rows

PAIRS = [("clear", "t"), ("noisy", "t")]


def make_features(rows=300, seed=0, noise=(0.3, 3.0), dims=(48, 40), text_dim=24):
    """Two image encoders and a text encoder, `t`, that share a latent vector, the second noisier; centred."""
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 12, generator=random)
    signal = latent @ torch.randn(12, text_dim, generator=random)
    features = {"t": signal + 0.3 * torch.randn(rows, text_dim, generator=random)}
    for name, level, dim in zip(("clear", "noisy"), noise, dims):
        signal = latent @ torch.randn(12, dim, generator=random)
        features[name] = signal + level * torch.randn(rows, dim, generator=random)
    return {name: x - x.mean(0) for name, x in features.items()}


def test_a_constant_encoder_agrees_with_nothing():
    """Its rows differ by rounding alone, of which no score may be made, and no error."""
    features = make_features(200)
    folder = {
        "constant": F.normalize(torch.randn(24, generator=torch.Generator().manual_seed(0)), dim=0).expand(200, 24)
    }
    store = SimpleNamespace(take=lambda name, rows: folder[name][rows])
    features |= centred_features(store, ["constant"], torch.arange(200))
    for selector in (linear_cka, calibrated_cka, debiased_cka, canonical_correlations):
        assert selector(features, [("constant", "t")]) == {("constant", "t"): 0}
    assert np.isfinite(gromov_wasserstein(features, [("constant", "t")])["constant", "t"])


def held_out(planted, rows):
    return Retrieval(Embeddings(planted), torch.arange(rows), CPU)


def test_cka_by_its_definition():
    """From [n, n] kernels, centred, and by the unbiased estimate with its sums written out."""
    features = make_features(120)
    linear, debiased = linear_cka(features, PAIRS), debiased_cka(features, PAIRS)
    n, kernels = 120, {name: (x @ x.T).double() for name, x in features.items()}
    centring = torch.eye(n).double() - 1 / n

    def hsic(k, q):
        return (k @ centring @ q @ centring).trace()

    def unbiased(k, q):
        k, q = k - k.diag().diag(), q - q.diag().diag()
        cross = k.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (k @ q).sum() / (n - 2)
        return ((k @ q).trace() + cross) / (n * (n - 3))

    for image, text in PAIRS:
        k, q = kernels[image], kernels[text]
        for found, of in ((linear, hsic), (debiased, unbiased)):
            assert found[image, text] == pytest.approx((of(k, q) / (of(k, k) * of(q, q)).sqrt()).item(), rel=1e-4)


def test_debiased_cka_does_not_grow_with_the_width():
    x, y = (torch.randn(200, 900, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    features = {"a": x - x.mean(0), "t": y - y.mean(0)}
    assert linear_cka(features, [("a", "t")])["a", "t"] > 0.7
    assert abs(debiased_cka(features, [("a", "t")])["a", "t"]) < 0.03


def test_calibrated_cka_by_permutations():
    """Of so few rows that the CKA of permuted captions is far above zero."""
    features = make_features(60, noise=(1.0, 3.0))
    found, plain = calibrated_cka(features, PAIRS), linear_cka(features, PAIRS)
    random = torch.Generator().manual_seed(0)
    nulls = {pair: [] for pair in PAIRS}
    for _ in range(400):
        shuffled = features | {"t": features["t"][torch.randperm(60, generator=random)]}
        for pair, cka in linear_cka(shuffled, PAIRS).items():
            nulls[pair].append(cka)
    for pair in PAIRS:
        null = np.mean(nulls[pair])
        assert null > 0.1 and found[pair] == pytest.approx((plain[pair] - null) / (1 - null), abs=0.01)


def test_calibrated_cka_does_not_mistake_white_noise_for_agreement():
    features = make_features(300, noise=(1.0, 14.0))
    features["white"] = torch.randn(300, 900, generator=torch.Generator().manual_seed(5))
    features["white"] = features["white"] - features["white"].mean(0)
    pairs = [*PAIRS, ("white", "t")]
    plain, calibrated = linear_cka(features, pairs), calibrated_cka(features, pairs)
    assert plain["white", "t"] > plain["noisy", "t"]
    assert calibrated["noisy", "t"] > 5 * abs(calibrated["white", "t"])


def test_gromov_wasserstein_by_its_definition():
    """Four indices at a time, with a coupling scaled until it stands still."""
    features = make_features(30)
    found = gromov_wasserstein(features, PAIRS)
    distances = {}
    for name, x in features.items():
        x = F.normalize(x.double(), dim=1)
        distances[name] = (1 - x @ x.T) / (1 - x @ x.T).mean()
    for image, text in PAIRS:
        squares = (distances[image][:, None, :, None] - distances[text][None, :, None, :]) ** 2  # [i, j, k, l]
        coupling = torch.full((30, 30), 1 / 900).double()
        for _ in range(UPDATES):
            gradient = 2 * torch.einsum("ijkl,kl->ij", squares, coupling)
            log = -gradient / (ENTROPY * distances[image].std() * distances[text].std())
            for _ in range(200):
                log = log - log.logsumexp(1, keepdim=True) - np.log(30)
                log = log - log.logsumexp(0, keepdim=True) - np.log(30)
            coupling = log.exp()
        cost = torch.einsum("ijkl,ij,kl->", squares, coupling, coupling).item()
        assert found[image, text] == pytest.approx(-cost, rel=0.03)


def test_gromov_wasserstein_knows_no_pairs():
    """It is the same for shuffled captions, and nearly zero for an encoder that is turned."""
    features = make_features(150)
    features["turned"] = (
        features["t"] @ torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3))).Q
    )
    pairs = [*PAIRS, ("turned", "t")]
    found = gromov_wasserstein(features, pairs)
    features["t"] = features["t"][torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    shuffled = gromov_wasserstein(features, pairs)
    assert found["turned", "t"] > 0.5 * found["clear", "t"] and found["turned", "t"] > 0.5 * found["noisy", "t"]
    for pair in pairs:
        assert shuffled[pair] == pytest.approx(found[pair], rel=1e-6)


def test_neighbours_against_sklearn():
    features = make_features(150)
    found = mutual_neighbours(features, PAIRS)
    search = NearestNeighbors(n_neighbors=11, metric="cosine")
    nearest = {name: search.fit(x).kneighbors(x, return_distance=False)[:, 1:] for name, x in features.items()}
    for image, text in PAIRS:
        shared = [len(set(a) & set(b)) / 10 for a, b in zip(nearest[image].tolist(), nearest[text].tolist())]
        assert found[image, text] == pytest.approx(np.mean(shared), abs=1e-3)


def test_canonical_correlations_against_scipy():
    """They are the cosines of the angles between the leading principal subspaces."""
    features, spectra = make_features(200), {}
    found = canonical_correlations(features, PAIRS, spectra)
    axes = {name: torch.linalg.svd(x, full_matrices=False).U[:, :24].numpy() for name, x in features.items()}
    for image, text in PAIRS:
        cosines = np.cos(scipy.linalg.subspace_angles(axes[image], axes[text]))
        assert spectra[image, text] == pytest.approx(sorted(cosines, reverse=True), abs=1e-3)
        assert found[image, text] == pytest.approx((cosines**2).mean(), abs=1e-3)


def test_ridge_probe_against_sklearn(planted):
    features, probed = make_features(300, noise=(0.3, 30)), held_out(planted, 60)
    found = ridge_probe(features, PAIRS, probed)
    for image, text in PAIRS:
        x, y = features[text], features[image]
        strength = 0.1 * (x[:240].T @ x[:240]).trace().item() / x.shape[1]
        model = Ridge(alpha=strength, fit_intercept=False, solver="cholesky").fit(x[:240], y[:240])
        scores = F.normalize(torch.tensor(model.predict(x[240:])).float(), dim=1) @ F.normalize(y[240:], dim=1).T
        own = scores.diag()
        recalls = [((scores >= own[:, None]).sum(1) <= 10), ((scores >= own[None]).sum(0) <= 10)]
        assert found[image, text] == pytest.approx(torch.stack(recalls).double().mean().item())
    assert found["clear", "t"] > 0.95 and found["noisy", "t"] < 0.8


def test_relative_representations_need_no_shared_space(planted):
    """Encoders turned and scaled by themselves are described alike; only their own anchors distinguish them."""
    features, probed = make_features(300), held_out(planted, 60)
    turned = {name: 3 * x @ torch.linalg.qr(torch.randn(x.shape[1], x.shape[1])).Q for name, x in features.items()}
    before, after = (relative_representations(each, PAIRS, probed) for each in (features, turned))
    assert before["clear", "t"] > 0.9 > before["noisy", "t"] > 0.2
    assert after == pytest.approx(before, abs=0.02)


def selectors(probed):
    return {
        "linear": linear_cka,
        "debiased": debiased_cka,
        "calibrated": calibrated_cka,
        "gromov": gromov_wasserstein,
        "neighbours": mutual_neighbours,
        "canonical": canonical_correlations,
        "ridge": lambda features, pairs: ridge_probe(features, pairs, probed),
        "relative": lambda features, pairs: relative_representations(features, pairs, probed),
    }


GRAMS = 2 * 300 * (48**2 + 40**2 + 24**2 + 48 * 24 + 40 * 24)  # 300 rows; 48, 40 and 24 dimensions


PROBED = 2 * 60**2  # of a dimension: 60 captions against 60 pictures, which both directions share


FLOPS = {
    "linear": GRAMS,
    "debiased": GRAMS,
    "calibrated": GRAMS,
    "gromov": 2 * 200**2 * (48 + 40 + 24) + 2 * (20 * (4 * 200**3 + 2 * 20 * 2 * 200**2) + 4 * 200**3),
    "neighbours": 2 * 300**2 * (48 + 40 + 24),
    "canonical": 2 * 300 * (48**2 + 40**2 + 24**2) + 9 * (48**3 + 40**3 + 24**3)
    + 2 * 300 * 24 * (48 + 40 + 24) + 2 * (2 * 300 * 24**2 + 22 * 24**3),
    "ridge": 2 * 240 * 24**2 + 24**3 // 3 + (2 * 240 * 24 + 2 * 24**2 + 2 * 60 * 24 + PROBED) * (48 + 40),
    "relative": 2 * 60 * 240 * (48 + 40 + 24) + 2 * PROBED * 240,
}  # fmt: skip


@pytest.mark.parametrize("name", list(FLOPS))
def test_flops_of_selectors_by_hand(name, planted):
    features, selector = make_features(300), selectors(held_out(planted, 60))[name]
    with flop_counter() as counter:
        selector(features, PAIRS)
    assert counter.get_total_flops() == FLOPS[name]


@pytest.mark.parametrize("name", ["debiased", "calibrated", "neighbours", "canonical", "ridge", "relative"])
def test_shuffled_captions_leave_selectors_at_chance(name, planted):
    features, selector = make_features(500, noise=(0.3, 0.6)), selectors(held_out(planted, 100))[name]
    together = selector(features, PAIRS)
    features["t"] = features["t"][torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    found = selector(features, PAIRS)
    chances = {
        "debiased": 0,
        "calibrated": 0,
        "neighbours": 10 / 499,
        "canonical": 24 / 500,
        "ridge": 0.1,
        "relative": 0.1,
    }
    chance = chances[name]
    for pair in PAIRS:
        assert abs(found[pair] - chance) < 0.06 and together[pair] > chance + 0.2, (pair, found, together)


def test_selector_rows_have_each_picture_once(tmp_path):
    rows = [{"image": f"{k // 3}.png"} for k in range(300)]
    data = Embeddings(make_embedding_folder(tmp_path / "e", rows))
    drawn = selector_rows(data, torch.arange(30, 300), 60)
    assert len(drawn) == 60 == len({i // 3 for i in drawn.tolist()}) and drawn.min() >= 30
    assert len(selector_rows(data, torch.arange(60), 60)) == 20  # evaluate.py leaves the selectors out of so few


@pytest.mark.parametrize("how", ["file", "rotation"])
def test_duplicate_encoders_are_noticed(run, planted, tmp_path, how):
    folder = tmp_path / "twice"
    shutil.copytree(planted, folder)
    x = torch.load(folder / "efflite1.pt", weights_only=True)
    if how == "rotation":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x = (x.float() @ torch.linalg.qr(torch.randn(1280, 1280)).Q).half()
        torch.save(x, folder / "efflite0.pt")
    else:
        shutil.copy(folder / "efflite1.pt", folder / "efflite0.pt")
    assert run("train_grid.py", "--data", folder, "--closed-form", "ridge", "--out", "x", "--device", "cpu").code == 0
    result = run("evaluate.py", "x", "--bootstrap", "10")
    lines = [line for line in result.out.splitlines() if "duplicates" in line]
    assert len(lines) == 1 and "efflite1" in lines[0] and "efflite0" in lines[0] and "control" not in lines[0]
    assert ("the same file" if how == "file" else "up to a rotation") in lines[0]
    assert "duplicates" in (tmp_path / "report" / "report.html").read_text()
