#!/usr/bin/env bash
# Guess: scipy.linalg.eigh and numpy.linalg.eigh call LAPACK in the precision of their input, so that for one float32
#        matrix both give eigenvectors orthogonal to some 1e-6, and NumPy is twice as fast as in float64.
# What happens: (1) SciPy's default driver "evr" gives vectors whose products reach 1e-4 and more (for an ordinary
#        covariance of 1024 features; it changes with the number of threads), 40 times and more as far off as its own
#        "evd", which is as fast; residuals a v - v w are equally small, so that check passes. (2) NumPy works in
#        float64 inside and rounds the result to float32: its vectors are orthogonal to 1e-8, at the time and memory
#        of float64.
# Versions: numpy 2.4.6, scipy 1.17.1 (wheels, OpenBLAS), CPU.
# Who is hit: whitening, PCA, rotations and low-rank factors in float32: v vᵀ is not the identity, and what rotates
#        forth and back does not return. Ported from NumPy to SciPy (or to torch, which is like "evd") results change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1
cat > "$folder/drivers.py" <<'PY'
import numpy as np
import scipy.linalg

x = np.random.default_rng(0).standard_normal((2048, 1024))
a = (x.T @ x).astype(np.float32)
results = {
    "scipy, default": scipy.linalg.eigh(a),
    "scipy, evd": scipy.linalg.eigh(a, driver="evd"),
    "numpy": np.linalg.eigh(a),
    "numpy, float64 rounded": tuple(part.astype(np.float32) for part in np.linalg.eigh(a.astype(float))),
}
orthogonal = {}
for name, (w, v) in results.items():
    assert w.dtype == v.dtype == np.float32
    v = v.astype(float)
    orthogonal[name] = abs(v.T @ v - np.eye(len(a))).max()
    residual = abs(a @ v - v * w).max() / w.max()
    print(f"{name}: largest |vᵀv - 1| {orthogonal[name]:.1e}, largest residual {residual:.1e} of the norm")
    assert residual < 5e-6
assert orthogonal["scipy, default"] > 20 * orthogonal["scipy, evd"] > 400 * orthogonal["numpy"]
assert all(np.array_equal(*parts) for parts in zip(results["numpy"], results["numpy, float64 rounded"]))
PY
"$folder/venv/bin/python" "$folder/drivers.py"
