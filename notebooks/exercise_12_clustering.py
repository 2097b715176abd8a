# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercise 12: image compression by clustering
#
# A photograph is a set of $N$ points $\mathbf{x}_i \in [0, 1]^3$, the colours of its pixels. Whoever keeps only
# $k = 5$ colours, and for each pixel the number of its colour, stores $\lceil \log_2 5 \rceil = 3$ bits a pixel
# in place of 24. We choose the five colours twice, by K-means and by a Gaussian mixture, and then turn the
# mixture round and draw pixels from it.
#
# The four functions below have the interface of the sheet: arrays of numpy in, arrays of numpy out. Each is a
# thin call of `mixproof`; problems 1 to 7 derive what happens inside. The sheet's functions take no source of
# randomness, so the notebook owns one, and its seed is written here.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats
from sklearn.datasets import load_sample_image

from mixproof.inference import em as expectation_maximisation
from mixproof.inference import lloyd
from mixproof.inference.validation import check_data, check_params
from mixproof.models import gaussian_full

generator = torch.Generator().manual_seed(12)
set_matplotlib_formats("jpeg", pil_kwargs={"quality": 85})

# %% [markdown]
# ## K-means
#
# K-means minimises the distortion
#
# $$J(\mathbf{X}, \mathbf{Z}, \boldsymbol\mu) = \sum_{i=1}^N \sum_{k=1}^K z_{ik} \,
# \lVert \mathbf{x}_i - \boldsymbol\mu_k \rVert_2^2$$
#
# by turns over the assignments and over the centres. It stops at a local minimum; the library therefore starts
# ten times from k-means++ seeds and keeps the best.


# %%
def kmeans(X: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres mu (k, D) and the cluster z (N,) of each row of X (N, D)."""
    found = lloyd.kmeans(torch.as_tensor(X), k, generator=generator)
    return found.centers.numpy(), found.labels.numpy()


# %% [markdown]
# ## Gaussian mixture
#
# The mixture gives each pixel and component the joint probability
#
# $$\log p(\mathbf{x}_i, z_i = k) = \log \pi_k +
# \log \mathcal{N}(\mathbf{x}_i \mid \boldsymbol\mu_k, \boldsymbol\Sigma_k).$$
#
# Its rows, after $\exp$, sum to the density $p(\mathbf{x}_i)$; divided by that sum they are the
# responsibilities of problem 2. EM stops when one step changes the log likelihood $\ell$ by no more than `tol`
# relative to its size, $\left|\ell_t - \ell_{t-1}\right| \le \mathtt{tol} \, \left|\ell_t\right|$.


# %%
def gmm_log_probability(X: np.ndarray, pi: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return log p(x_i, z_i = k), shape (N, k), of rows X (N, D) under a mixture.

    The mixture has weights pi (k,), means mu (k, D) and covariances sigma (k, D, D).
    """
    x = check_data(X)
    params = check_params(gaussian_full, (pi, mu, sigma), x.shape[1])
    return gaussian_full.log_joint(params, x).numpy()


def em(X: np.ndarray, k: int, tol: float = 0.001) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights pi (k,), means mu (k, D) and covariances sigma (k, D, D) fitted to rows X (N, D)."""
    start = gaussian_full.init_params(check_data(X), k, generator)
    pi, mu, sigma = expectation_maximisation.em(gaussian_full, X, start, rtol=tol).params
    return pi.numpy(), mu.numpy(), sigma.numpy()


def gmm_sample(N: int, pi: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return N independent draws X (N, D): of each first its component, then the point."""
    params = check_params(gaussian_full, (pi, mu, sigma), mu.shape[1])
    x, _ = gaussian_full.sample(params, N, generator)
    return x.numpy()


# %% [markdown]
# ## The photograph

# %%
image = load_sample_image("flower.jpg") / 255
X = image.reshape(-1, 3)
k = 5
Markdown(
    f"{image.shape[0]} x {image.shape[1]} pixels: a matrix of {X.shape[0]:,} rows "
    f"and {X.shape[1]} columns, with {len(np.unique(X, axis=0)):,} different colours."
)


# %%
def show(*panels: tuple[str, np.ndarray]) -> None:
    """Show pixels (N, 3) as images of the photograph's shape, colours clipped to [0, 1]."""
    size = (4.4 * len(panels), 3.2)
    _, axes = plt.subplots(1, len(panels), figsize=size, dpi=110, layout="constrained")
    for ax, (title, pixels) in zip(axes, panels, strict=True):
        ax.imshow(pixels.reshape(image.shape).clip(0, 1))
        ax.set_title(title)
        ax.axis("off")
    plt.show()


def table(head: list[str], rows: list[list[str]]) -> Markdown:
    """Return a table of a column of names and further columns of numbers."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


# %% [markdown]
# ## Compression by K-means
#
# Each pixel is replaced by its centre.

# %%
centers, z = kmeans(X, k)
by_kmeans = centers[z]
show(("original", X), (f"K-means, k = {k}", by_kmeans))

# %% [markdown]
# ## Compression by a Gaussian mixture
#
# Each pixel is replaced by the mean of its most likely component,
# $\boldsymbol\mu_{\arg\max_k p(\mathbf{x}_i, z_i = k)}$. The fit is by plain maximum likelihood. A component
# that shrank onto pixels of one colour would make the likelihood infinite, and the library would stop with an
# error. None comes near that here: the table gives each component's smallest standard deviation in any
# direction of colour space, and in its last line that of rounding to 256 levels, $1 / (255 \sqrt{12})$.

# %%
pi, mu, sigma = em(X, k)
most_likely = gmm_log_probability(X, pi, mu, sigma).argmax(1)
by_mixture = mu[most_likely]
show(("original", X), (f"Gaussian mixture, k = {k}", by_mixture))

# %%
narrowest = np.sqrt(np.linalg.eigvalsh(sigma)[:, 0])
components = []
for j in range(k):
    numbers = [f"{value:.3f}" for value in (pi[j], *mu[j])]
    components.append([f"{j + 1}", *numbers, f"{narrowest[j]:.4f}"])
rounding = ["rounding", "", "", "", "", f"{1 / (255 * np.sqrt(12)):.4f}"]
head = ["component", "weight", "red", "green", "blue", "smallest standard deviation"]
table(head, [*components, rounding])

# %% [markdown]
# `tol = 0.001` is coarse: EM stops while a step may still gain a thousandth of the log likelihood. A second fit,
# from another start of the same kind and with a far smaller `tol`, shows what that leaves.

# %%
tight = em(X, k, tol=1e-5)


def log_likelihood(pi: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> float:
    """Return the log likelihood of the photograph."""
    return float(np.logaddexp.reduce(gmm_log_probability(X, pi, mu, sigma), axis=1).sum())


Markdown(
    f"Log likelihood at `tol = 0.001`: {log_likelihood(pi, mu, sigma):,.0f}; "
    f"at `tol = 1e-5`: {log_likelihood(*tight):,.0f}."
)

# %% [markdown]
# ## Pixels drawn from the mixture

# %%
drawn = gmm_sample(len(X), pi, mu, sigma)
show(("original", X), ("as many independent draws", drawn))

# %% [markdown]
# The draws have the colours of the photograph in its proportions, but the flower is gone: what one sees is
# noise. The reason is that the mixture models pixels as independent and identically distributed, so that it
# knows how often a colour occurs and nothing of where it occurs or of what lies beside it. Sorted by colour,
# both images would look nearly alike; only nearly, because a Gaussian is symmetric and unbounded, so that the
# draws blur the sharp edges of the true distribution of colours and some of them leave the cube $[0, 1]^3$.

# %%
outside = ((drawn < 0) | (drawn > 1)).any(axis=1).mean()
photograph, draws = (", ".join(f"{value:.3f}" for value in pixels.mean(0)) for pixels in (X, drawn))
Markdown(
    f"Of the draws, {outside:.1%} lie outside the cube and were clipped for display. "
    f"Mean colour of the photograph: ({photograph}); of the draws: ({draws})."
)


# %% [markdown]
# ## Comparison
#
# Distortion is $J$, the sum of squared distances between the pixels and what replaces them; the square root of
# its mean over pixels and channels is easier to read.


# %%
def measures(name: str, replaced: np.ndarray) -> list[str]:
    """Return a line of the table for a compression (N, 3) of the photograph."""
    distortion = ((X - replaced) ** 2).sum()
    kept = 1 - distortion / ((X - X.mean(0)) ** 2).sum()
    return [name, f"{distortion:,.1f}", f"{np.sqrt(distortion / X.size):.4f}", f"{kept:.1%}"]


by_tight_mixture = tight[1][gmm_log_probability(X, *tight).argmax(1)]
table(
    [f"compression to {k} colours", "distortion", "root mean square", "variance kept"],
    [
        measures("K-means", by_kmeans),
        measures("Gaussian mixture, `tol = 0.001`", by_mixture),
        measures("Gaussian mixture, `tol = 1e-5`", by_tight_mixture),
    ],
)

# %% [markdown]
# K-means wins by construction, since the distortion is what it minimises. The mixture maximises another
# quantity, the likelihood, and spends its components where pixels are dense: a component may be wide, and the
# mean of a wide component is a poor stand-in for a pixel far from it. What the mixture has instead is a
# density, and that is what made the draws possible.
