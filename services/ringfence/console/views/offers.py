"""An agent that its sponsor offers to whoever has the address of this page."""

from __future__ import annotations

from ringfence.client.errors import ApiError
from ringfence.console.views.page import Page, View


async def offer(view: View) -> Page:
    """What is offered, and what each side signs next. Raises ApiError (404) if the offer is over."""
    found = view.offers.opened(view.id)
    # The rest is read for who made the offer: this asks whether the viewer still is somebody.
    await view.reads.record("user", view.session.user_id)
    try:
        record = await view.offers.reads(found).record("agent", found.agent_id)
    except ApiError as error:
        if error.status in (401, 404):
            raise ApiError("there is no such offer, or it is over", status=404) from None
        raise
    return Page(
        "offer.html",
        f"Agent {found.agent_id} for a new sponsor",
        {
            "offer": found,
            "sealed": view.id,
            "state": record["state"],
            "mine": found.by == view.session.user_id,
            "over": record["state"]["sponsor"] != found.by,
        },
        "agents",
    )
