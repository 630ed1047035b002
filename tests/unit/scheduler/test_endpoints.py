import pytest

from services.common.errors import NotFoundError, PreconditionError, UnavailableError
from services.scheduler.costs import DEFAULT_COST_MODEL, CostModel
from services.scheduler.endpoints import WorkerTable
from services.scheduler.pools import Pool
from services.scheduler.views import Charge, Load, WorkerState
from tests.unit.scheduler.build import Orders, make_registration, make_worker

LEASE_S = 3.0


@pytest.fixture
def pool() -> Pool:
    return Pool({})


@pytest.fixture
def table() -> WorkerTable:
    return WorkerTable(LEASE_S)


def test_a_snapshot_does_not_change_afterwards(table: WorkerTable, pool: Pool) -> None:
    registration = make_registration(make_worker("a"), pool)
    table.register(registration, 0.0)
    snapshot = table.snapshot(pool)
    table.report(registration, Load(num_free_pages=1, num_running=7), 0.0)
    table.register(make_registration(make_worker("b"), pool), 0.0)
    assert [view.worker_id for view in snapshot] == ["a"]
    assert snapshot[0].load.num_running == 0
    assert [view.load.num_running for view in table.snapshot(pool)] == [7, 0]


def test_a_new_epoch_replaces_the_old_and_ends_its_registration(
    table: WorkerTable, pool: Pool
) -> None:
    orders = Orders()
    old = make_registration(make_worker("a", epoch=1), pool, orders)
    table.register(old, 0.0)
    table.register(make_registration(make_worker("a", epoch=2), pool), 0.0)
    assert [view.worker.epoch for view in table.snapshot(pool)] == [2]
    assert isinstance(orders.errors[0], PreconditionError)
    assert not table.remove(old)
    table.report(old, Load(num_free_pages=0, num_running=9), 0.0)
    assert [view.load.num_running for view in table.snapshot(pool)] == [0]


def test_a_silent_worker_is_suspect_then_gone(table: WorkerTable, pool: Pool) -> None:
    orders = Orders()
    registration = make_registration(make_worker("a"), pool, orders)
    table.register(registration, 0.0)
    assert table.sweep(0.9) == []
    assert table.snapshot(pool)[0].state is WorkerState.READY
    assert table.sweep(1.1) == []
    assert table.snapshot(pool)[0].state is WorkerState.SUSPECT
    assert table.sweep(LEASE_S + 0.1) == [registration.worker]
    assert table.snapshot(pool) == ()
    assert isinstance(orders.errors[0], UnavailableError)


def test_a_suspect_that_speaks_again_is_ready(table: WorkerTable, pool: Pool) -> None:
    registration = make_registration(make_worker("a"), pool)
    table.register(registration, 0.0)
    table.sweep(1.5)
    table.report(registration, Load(num_free_pages=1), 1.6)
    assert table.snapshot(pool)[0].state is WorkerState.READY
    assert table.sweep(1.7) == []
    assert table.snapshot(pool)[0].state is WorkerState.READY


def test_draining_is_asked_once_and_outlives_reports(table: WorkerTable, pool: Pool) -> None:
    orders = Orders()
    registration = make_registration(make_worker("a"), pool, orders)
    table.register(registration, 0.0)
    table.drain("a", "maintenance")
    table.drain("a", "maintenance")
    table.report(registration, Load(num_free_pages=1), 0.1)
    assert table.snapshot(pool)[0].state is WorkerState.DRAINING
    assert orders.drains == ["maintenance"]


def test_a_worker_that_drains_by_itself_is_draining(table: WorkerTable, pool: Pool) -> None:
    registration = make_registration(make_worker("a"), pool)
    table.register(registration, 0.0)
    table.report(registration, Load(num_free_pages=1, draining=True), 0.1)
    assert table.snapshot(pool)[0].state is WorkerState.DRAINING


def test_draining_a_stranger_is_not_found(table: WorkerTable) -> None:
    with pytest.raises(NotFoundError):
        table.drain("nobody", "")


def test_charges_count_as_load_and_come_off(table: WorkerTable, pool: Pool) -> None:
    worker = make_worker("a")
    registration = make_registration(worker, pool)
    table.register(registration, 0.0)
    charge = Charge(2, 10, 320, 5_000_000)
    table.add_charge(worker, charge)
    view = table.snapshot(pool)[0]
    assert (view.num_active, view.num_free_sequences) == (2, worker.max_running_sequences - 2)
    assert view.queued_prefill_ns == 5_000_000
    assert view.decode_step_ns == view.cost_model.decode_step_ns(2, 320)
    assert view.num_available_tokens == (worker.num_pages - 10) * worker.page_size
    table.remove_charge(worker, charge)
    assert table.snapshot(pool)[0].charge == Charge()


def test_an_admitting_report_replaces_the_charge_in_one_step(
    table: WorkerTable, pool: Pool
) -> None:
    worker = make_worker("a")
    registration = make_registration(worker, pool)
    table.register(registration, 0.0)
    charge = Charge(1, 10, 160, 5_000_000)
    table.add_charge(worker, charge)
    table.report(registration, Load(num_free_pages=90, num_running=1), 0.1, charge)
    assert table.snapshot(pool)[0].num_active == 1


def test_a_charge_for_a_replaced_registration_is_void(table: WorkerTable, pool: Pool) -> None:
    old = make_worker("a")
    table.register(make_registration(old, pool), 0.0)
    table.register(make_registration(make_worker("a"), pool), 0.0)
    table.add_charge(old, Charge(1))
    assert table.snapshot(pool)[0].num_active == 0


def test_a_worker_without_a_fit_borrows_its_pools(table: WorkerTable, pool: Pool) -> None:
    first = make_registration(make_worker("a"), pool)
    table.register(first, 0.0)
    assert table.snapshot(pool)[0].cost_model is DEFAULT_COST_MODEL
    fitted = CostModel(prefill_token_ns=1.0)
    table.report(first, Load(num_free_pages=1, cost_model=fitted), 0.0)
    table.register(make_registration(make_worker("b"), pool), 0.0)
    assert [view.cost_model for view in table.snapshot(pool)] == [fitted, fitted]


def test_a_pools_first_fit_is_that_of_workers_without_their_own(
    table: WorkerTable, pool: Pool
) -> None:
    first, second = (make_registration(make_worker(name), pool) for name in "ab")
    table.register(first, 0.0)
    table.register(second, 0.0)
    slow, slower = CostModel(prefill_token_ns=2e6), CostModel(prefill_token_ns=3e6)
    table.report(first, Load(num_free_pages=1, cost_model=slow), 0.0)
    assert [view.cost_model for view in table.snapshot(pool)] == [slow, slow]
    table.report(second, Load(num_free_pages=1, cost_model=slower), 0.0)
    assert [view.cost_model for view in table.snapshot(pool)] == [slow, slower]


def test_the_version_grows_only_with_what_others_can_see(table: WorkerTable, pool: Pool) -> None:
    changes: list[bool] = []
    table.on_change = changes.append
    registration = make_registration(make_worker("a"), pool)
    table.register(registration, 0.0)
    table.report(registration, Load(num_free_pages=5), 0.1)
    table.report(registration, Load(num_free_pages=4, num_running=1), 0.2)
    version = table.version
    table.report(registration, Load(num_free_pages=3, num_running=1), 0.3)
    assert table.version == version
    assert changes == [True, False]


def test_a_pools_limits_outlive_its_workers(table: WorkerTable, pool: Pool) -> None:
    small = make_registration(make_worker("a", context_length=100), pool)
    large = make_registration(make_worker("b", context_length=200), pool)
    table.register(small, 0.0)
    table.register(large, 0.0)
    assert table.limits(pool).context_length == 100
    table.remove(small)
    assert table.limits(pool).context_length == 200
    table.remove(large)
    assert table.limits(pool).context_length == 200
