"""Arithmetic, forms and checks of linear operators against dense matrices."""

import sys

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn

from hvpopt.operators import LinearOperator, from_product
from hvpopt.products import linearize
from hvpopt.solvers import cg, top_eigenpairs

SHAPES = [(2, 3), (), (4,)]
N = 11


def vectors(k=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lead = () if k is None else (k,)
    return [torch.randn((*lead, *s), generator=generator, dtype=torch.float64) for s in SHAPES]


def flat(v, k=None):
    lead = () if k is None else (k,)
    return torch.cat([x.reshape(*lead, -1) for x in v], -1)


def matrix(seed=0, symmetric=True):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(N, N, generator=generator, dtype=torch.float64)
    return m + m.T if symmetric else m


def parts(x):
    return [p.reshape(s) for p, s in zip(x.split([6, 1, 4]), SHAPES, strict=True)]


def operator(m, symmetric=True):
    return LinearOperator(vectors(), lambda v: parts(m @ flat(v)), symmetric=symmetric)


def test_an_operator_knows_its_space():
    A = operator(matrix())
    assert A.shape == (N, N)
    assert A.shapes == SHAPES
    assert A.dtype == torch.float64
    assert A.device == torch.device("cpu")
    mixed = LinearOperator([torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)], lambda v: v)
    assert mixed.dtype == torch.float32
    assert [x.dtype for x in mixed @ mixed.like] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(mixed @ torch.ones(4), torch.ones(4))


def test_every_form_of_a_vector_gets_its_product_in_that_form():
    m, v, vs = matrix(), vectors(), vectors(3)
    A = operator(m)
    torch.testing.assert_close(flat(A.matvec(v)), m @ flat(v))
    torch.testing.assert_close(flat(A(v)), m @ flat(v))
    torch.testing.assert_close(flat(A @ v), m @ flat(v))
    torch.testing.assert_close(flat(A @ tuple(v)), m @ flat(v))
    torch.testing.assert_close(A @ flat(v), m @ flat(v))
    torch.testing.assert_close(A @ flat(vs, 3).T, m @ flat(vs, 3).T)
    torch.testing.assert_close(flat(A.matmat(vs), 3), flat(vs, 3) @ m.T)
    assert [x.shape for x in A.matmat(vs)] == [(3, *s) for s in SHAPES]


def test_arithmetic_is_that_of_the_matrices():
    m, k, v = matrix(1), matrix(2, symmetric=False), flat(vectors())
    A, B = operator(m), operator(k, symmetric=False)
    eye = torch.eye(N, dtype=torch.float64)
    for got, expected in [
        (A + B, m + k),
        (A - B, m - k),
        (-A, -m),
        (2 * A, 2 * m),
        (A * torch.tensor(0.5), m / 2),
        (A / 4, m / 4),
        (A.damped(0.3), m + 0.3 * eye),
        (
            A.damped([1.0, 2.0, 3.0]),
            m + torch.diag(torch.tensor([1.0] * 6 + [2.0] + [3.0] * 4, dtype=torch.float64)),
        ),
        ((A + 2 * B).damped(1.0) - A, 2 * k + eye),
    ]:
        torch.testing.assert_close(got @ v, expected @ v)
        torch.testing.assert_close(got.to_dense(), expected)
    assert (A + A).symmetric
    assert not (A + B).symmetric


def test_a_block_is_the_dense_submatrix():
    m = matrix()
    A = operator(m)
    rows = [*range(7, 11), *range(6)]  # in the order asked for
    expected = m[rows][:, rows]
    module = nn.ParameterDict({"a": nn.Parameter(A.like[0]), "b": nn.Parameter(torch.zeros(1))})
    named = LinearOperator([module["a"], *A.like[1:]], lambda v: parts(m @ flat(v)), symmetric=True)
    for which in ([2, 0], [-1, 0], [A.like[2], A.like[0]], {"params": [A.like[2], A.like[0]]}):
        torch.testing.assert_close(A.block(which).to_dense(), expected)
    torch.testing.assert_close(A.block(1).to_dense(), m[6:7, 6:7])
    torch.testing.assert_close(A.block(A.like[1]).to_dense(), m[6:7, 6:7])
    torch.testing.assert_close(A.block(slice(0, 2)).to_dense(), m[:7, :7])
    torch.testing.assert_close(named.block(module).to_dense(), m[:6, :6])
    torch.testing.assert_close(A.block([0, 2]).block(1) @ torch.ones(4).double(), m[7:, 7:].sum(1))


def test_a_dense_matrix_is_made_in_chunks_that_fit_the_budget():
    m, widths = matrix(symmetric=False), []

    def matmat(vs):
        widths.append(len(vs[0]))
        products = [parts(m @ row) for row in flat(vs, len(vs[0]))]
        return [torch.stack(xs) for xs in zip(*products, strict=True)]

    A = LinearOperator(vectors(), lambda v: parts(m @ flat(v)), matmat=matmat)
    torch.testing.assert_close(A.to_dense(memory_budget=(N + 4 * 4) * N * 8), m)
    assert widths == [4, 4, 3]
    torch.testing.assert_close(A.to_dense(), m)
    assert widths[3:] == [11]


def test_a_dense_matrix_over_the_budget_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"11 × 11 in torch.float64 needs 1.29 KiB, more than"):
        operator(matrix()).to_dense(memory_budget=1000)
    big = LinearOperator([torch.empty(10**6, device="meta")], lambda v: v)
    with pytest.raises(ValueError, match=r"needs 3.64 TiB, more than memory_budget=2 GiB"):
        big.to_dense()


def test_scipy_finds_the_eigenvalues_of_the_dense_matrix():
    m = matrix()
    A = operator(m).to_scipy()
    expected = torch.linalg.eigvalsh(m)
    found = scipy.sparse.linalg.eigsh(A, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), expected[-3:].numpy(), rtol=1e-10)
    x = np.random.default_rng(0).standard_normal((N, 2))
    np.testing.assert_allclose(A @ x, m.numpy() @ x)
    np.testing.assert_allclose(A.rmatvec(x[:, 0]), m.numpy() @ x[:, 0])
    np.testing.assert_allclose(A.rmatmat(x), m.numpy() @ x)
    assert A.dtype == np.float64


def test_scipy_gets_float32_from_narrower_tensors_and_no_adjoint_of_a_general_map():
    A = LinearOperator([torch.zeros(2, dtype=torch.bfloat16)], lambda v: [2 * v[0]])
    np.testing.assert_allclose(A.to_scipy() @ np.ones(2), [2.0, 2.0])
    assert A.to_scipy().dtype == np.float32
    general = operator(matrix(symmetric=False), symmetric=False).to_scipy()
    with pytest.raises(NotImplementedError):
        general.rmatvec(np.ones(N))


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        operator(matrix()).to_scipy()


def test_solvers_take_an_operator_as_it_is():
    m = matrix()
    A = operator(m @ m).damped(1.0)
    b = vectors(seed=5)
    solution = cg(A, b, max_steps=50)
    expected = torch.linalg.solve(m @ m + torch.eye(N, dtype=torch.float64), flat(b))
    torch.testing.assert_close(flat(solution.value), expected, rtol=1e-2, atol=1e-3)
    top = top_eigenpairs(A, A.like, max_steps=20).values[0]
    assert top == pytest.approx(float(torch.linalg.eigvalsh(m @ m)[-1]) + 1, rel=1e-6)


def test_a_linearization_becomes_an_operator():
    x = [torch.tensor([1.0, 2.0])]
    A = from_product(linearize(lambda p: (p[0] ** 3).sum() + p[0].prod(), x).hvp, x)
    torch.testing.assert_close(A.to_dense(), torch.tensor([[6.0, 1.0], [1.0, 12.0]]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A: A.matvec(vectors()[:2]), ValueError, r"v is a list of 2; expected a list of 3"),
        (lambda A: A.matvec(torch.ones(N)), ValueError, r"v is Tensor; expected a list of 3"),
        (
            lambda A: A.matvec([x.float() for x in vectors()]),
            ValueError,
            r"v\[0\] has dtype torch.float32; expected torch.float64",
        ),
        (
            lambda A: A.matvec([x.reshape(-1) for x in vectors()]),
            ValueError,
            r"v\[0\] has shape \(6,\); expected \(2, 3\)",
        ),
        (
            lambda A: A.matvec([x.to("meta") for x in vectors()]),
            ValueError,
            r"v\[0\] has device meta; expected cpu",
        ),
        (lambda A: A.matmat(vectors()), ValueError, r"with one k ≥ 1"),
        (lambda A: A.matmat([torch.ones(2, 1), *vectors(2)[1:]]), ValueError, r"v\[0\] has shape"),
        (lambda A: A @ torch.ones(5), ValueError, r"shape \(11, 11\) was given .* \(5,\)"),
        (lambda A: A @ torch.ones(N), ValueError, r"dtype torch.float32; expected torch.float64"),
        (lambda A: A @ A, TypeError, r"multiplied by a LinearOperator"),
        (lambda A: A + 1.0, TypeError, r"The sum of an operator and a float; .* damped\(damping\)"),
        (
            lambda A: A - LinearOperator([torch.zeros(N)], lambda v: v),
            ValueError,
            r"The difference of operators on different vectors",
        ),
        (lambda A: A * "2", TypeError, r"The factor is a str; expected a real number"),
        (lambda A: A * float("nan"), ValueError, r"The factor is nan; expected a finite number"),
        (lambda A: A.damped([1.0]), ValueError, r"1 dampings were given for 3 tensors"),
        (lambda A: A.damped(float("inf")), ValueError, r"The damping is inf"),
        (lambda A: A.block([]), ValueError, r"distinct parameters, at least one"),
        (lambda A: A.block([0, -3]), ValueError, r"distinct parameters"),
        (lambda A: A.block(3), ValueError, r"Index 3 is out of range for 3 parameters"),
        (lambda A: A.block(torch.ones(2)), ValueError, r"none of the operator's parameters"),
        (lambda A: A.block(nn.Linear(2, 2)), ValueError, r"at least one"),
        (lambda A: A.block("weight"), TypeError, r"chosen by a str; expected indices"),
        (lambda A: A.block(1.5), TypeError, r"chosen by a float; expected indices"),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(operator(matrix()))


def test_products_of_the_wrong_shape_are_named():
    A = LinearOperator(vectors(), lambda v: [v[1], v[1], v[2]])
    with pytest.raises(ValueError, match=r"the product\[0\] has shape \(\); expected \(2, 3\)"):
        A.matvec(vectors())


def test_a_space_needs_real_tensors():
    with pytest.raises(ValueError, match="like hold no tensor"):
        LinearOperator([], lambda v: v)
    with pytest.raises(TypeError, match=r"like\[0\] is torch.int64"):
        LinearOperator([torch.zeros(2, dtype=torch.int64)], lambda v: v)


def test_an_operator_without_entries_is_an_empty_matrix():
    assert LinearOperator([torch.zeros(0, 2)], lambda v: v).to_dense().shape == (0, 0)
