import jax
import jax.numpy as jnp
import optax
import pytest

from jaxlm.contract import (
    BASE,
    Adapter,
    Between,
    Extra,
    Method,
    bound,
    compose,
    copy_of_params,
    whole,
)


def test_two_objectives_are_refused():
    objective = lambda *a: None
    with pytest.raises(ValueError, match="2 of the composed methods bring their own objective"):
        compose(Method(objective), Method(objective))


def test_two_adapters_are_refused():
    part = Method(adapter=Adapter(lambda lm, base: lm, lambda lm, base, params: params))
    with pytest.raises(ValueError, match="2 of the composed methods bring their own adapter"):
        compose(part, part)
    assert compose(part, Method()).adapter is part.adapter


def test_a_bound_model_is_that_of_the_base():
    part = Method(adapter=Adapter(lambda lm, base: (lm, base), lambda lm, base, p: (base, p)))
    assert bound("lm", part, {BASE: 1}) == ("lm", 1)
    assert whole("lm", part, 2, {BASE: 1}) == (1, 2)
    assert (bound("lm", Method(), {}), whole("lm", Method(), 2, {})) == ("lm", 2)


def test_extras_of_one_name_are_refused():
    part = Method(extras={"reference": Extra(copy_of_params)})
    with pytest.raises(ValueError, match="reference"):
        compose(part, part)


def test_a_route_is_no_field_of_a_record():
    with pytest.raises(ValueError, match=r"routes \['weights'\] have the names of what records"):
        compose(Method(routes={"weights": ("code",)}))


def test_between_may_only_write_what_exists():
    part = Method(between=(Between(1, ("reference",), lambda p, e: {}),))
    with pytest.raises(ValueError, match="no composed method defines it"):
        compose(part)
    assert compose(part, Method(extras={"reference": Extra(copy_of_params)})).between


def test_the_first_wrap_sees_the_gradient_first():
    seen = []

    def tell(name):
        def update(updates, state, params=None):
            seen.append(name)
            return updates, state

        gate = optax.GradientTransformation(lambda p: optax.EmptyState(), update)
        return Method(wrap=lambda tx: optax.chain(gate, tx))

    tx = compose(tell("outer"), tell("inner")).wrap(optax.identity())
    tx.update({}, tx.init({}))
    assert seen == ["outer", "inner"]


def test_a_copied_extra_shares_no_buffer():
    params = {"w": jnp.ones(3)}
    extra = copy_of_params(params, None)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    assert extra["w"].tolist() == [1, 1, 1]


def test_oversample_and_separable_compose():
    method = compose(Method(oversample=5), Method(separable=False))
    assert method.oversample == 5
    assert not method.separable
    assert method.wrap is None
