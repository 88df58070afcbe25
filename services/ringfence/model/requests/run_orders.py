"""Who may order a run, and stop one: the checks that a runner makes of an order before it claims the run. Pure.

What the runner's pool allows (agents, images, mounts) is the runner's own, and is not checked here.
"""

from __future__ import annotations

from typing import TypeVar

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.codes import Code, inactive_agent
from ringfence.messages.registry import AgentState, TaskState, UserState
from ringfence.messages.run import RunOrder, RunStop
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.model.unknown_fields import describe_unknown, unknown_fields
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused

C = TypeVar("C", bound=ExpiringClaims)
MAX_ORDER_BYTES = 192 * 1024


def verified_order(compact: str | bytes, directory: Directory, appended_at_ms: int) -> Signed[RunOrder]:
    """Verify that a user signed an order in time, with a key that counted at its append time.

    Raises InvalidMessageError: SignatureError, ExpiredError, or the order is malformed or too large.
    """
    return _verified(compact, RunOrder, directory, appended_at_ms)


def verified_stop(compact: str | bytes, directory: Directory, appended_at_ms: int) -> Signed[RunStop]:
    """Verify that a user signed a stop in time, with a key that counted at its append time. Raises as
    `verified_order`.
    """
    return _verified(compact, RunStop, directory, appended_at_ms)


def _verified(compact: str | bytes, model: type[C], directory: Directory, appended_at_ms: int) -> Signed[C]:
    if len(compact) > MAX_ORDER_BYTES:
        raise InvalidMessageError(
            f"a {model.typ} of {len(compact)} bytes; the limit is {MAX_ORDER_BYTES}", code=Code.TOO_LARGE
        )
    try:
        return verify(
            parse(compact),
            model,
            lambda iss, kid: directory.user_key(iss, kid, appended_at_ms / 1000),
            audience=directory.trust.trust_domain,
            appended_at_ms=appended_at_ms,
        )
    except ChainError as error:
        raise InvalidMessageError(str(error), code=error.code) from None


def order_id_of(order: RunOrder) -> str:
    """The id of an order: the same wherever it stands."""
    return message_id(order.iss, order.jti)


def check_order(order: RunOrder, kid: str, directory: Directory, at_s: float) -> Verdict:
    """Check that a verified order may start a run. `kid` is the key that signed it, and `at_s` its append time.

    1. It has no field that is unknown here.
    2. The records of task, agent and signer verify.
    3. The signer's key rests on no compromised key.
    4. The key itself was not compromised by `at_s`.
    5. The agent is active.
    6. The task is there, is this agent's, and has not ended by `at_s`.
    7. The signer is an active user: the task's assigner, its user, or the agent's sponsor.
    """
    if fields := unknown_fields(order):
        return refused(Code.UNKNOWN_FIELD, describe_unknown(fields, "the order"))
    try:
        task, agent = directory.task(order.task_id), directory.agent(order.agent_id)
        user_id = subject_of(order.aud, order.iss, "user")
        user = directory.user(user_id) if user_id is not None else None
        vouchers = directory.check_vouchers(order.iss, kid)
    except ChainError as error:
        return refused(Code.RECORD_UNTRUSTED, str(error))
    if isinstance(vouchers, Refused):
        message = f"{vouchers.reason.message}; order the run with another key"
        return refused(Code.KEY_VOUCHER_COMPROMISED, message)
    since_ms = (user.state.compromised or {}).get(kid) if user is not None else None
    if since_ms is not None and at_s * 1000 >= since_ms:
        message = f"key {kid} of {order.iss} is ended as compromised; order the run with another key"
        return refused(Code.KEY_COMPROMISED, message)
    if agent is None:
        return refused(Code.AGENT_UNKNOWN, f"agent {order.agent_id} is unknown")
    if agent.state.status != "active":
        return refused(inactive_agent(agent.state.status), f"agent {order.agent_id} is {agent.state.status}")
    if task is None:
        return refused(Code.TASK_UNKNOWN, f"there is no task {order.task_id}")
    if task.state.agent_id != order.agent_id:
        return refused(Code.TASK_OTHER_AGENT, f"task {order.task_id} was assigned to another agent")
    if task.state.status != "active" or task.state.not_after <= at_s:
        return refused(Code.TASK_ENDED, f"task {order.task_id} has ended")
    return _check_user(order.iss, user, task, agent)


def check_stop(
    stop: RunStop, directory: Directory, *, agent_id: str, task_id: str, ordered_by: str | None
) -> Verdict:
    """Check that a verified stop may end a run: its signer ordered the run, or may order one.

    An unknown field does not hold it up: a stop takes rights away, and gives none.
    """
    if stop.iss == ordered_by:
        return ALLOWED
    try:
        task, agent = directory.task(task_id), directory.agent(agent_id)
        user_id = subject_of(stop.aud, stop.iss, "user")
        user = directory.user(user_id) if user_id is not None else None
    except ChainError as error:
        return refused(Code.RECORD_UNTRUSTED, str(error))
    if task is None or agent is None:
        return refused(Code.TASK_UNKNOWN, f"there is no task {task_id} of agent {agent_id}")
    return _check_user(stop.iss, user, task, agent)


def _check_user(
    signer: str,
    user: VerifiedRecord[UserState] | None,
    task: VerifiedRecord[TaskState],
    agent: VerifiedRecord[AgentState],
) -> Verdict:
    if user is None or user.state.status != "active" or user.state.delegation is not None:
        return refused(Code.USER_DISABLED, f"{signer} is no active user")
    if user.state.user_id not in (task.state.assigned_by, task.state.on_behalf_of, agent.state.sponsor):
        message = "a run is ordered and stopped by its task's assigner or user, or by its agent's sponsor"
        return refused(Code.NOT_ENTITLED, message)
    return ALLOWED
