"""The SCIM 2.0 HTTP API (RFC 7644): parses requests, answers with resources or errors."""

from __future__ import annotations

import functools
import logging
import operator
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from pydantic import ValidationError
from scim2_models import (
    Context,
    Error,
    ForbiddenException,
    ListResponse,
    NotFoundException,
    PatchOp,
    PayloadTooLargeException,
    Resource,
    ResponseParameters,
    SCIMException,
    ScimPolicy,
    SearchRequest,
)
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.client.errors import NotAnsweredError, RefusedError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.base.metrics import HTTP_REQUESTS
from ringfence.kernel.service.bearer_tokens import WRONG_WINDOW_MS, Tokens, WrongTokens
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.registry import GroupLink, UserRecord
from ringfence.scim.provisioning import DirectoryView, ProvisioningWriter
from ringfence.scim.resources import (
    MAX_RESULTS,
    Group,
    User,
    group_resource,
    resource_types,
    schemas,
    service_provider_config,
    user_resource,
)

log = logging.getLogger(__name__)

BASE = "/scim/v2"
MAX_BODY_BYTES = 1024 * 1024
MEDIA_TYPE = "application/scim+json"
_DEFAULT_PAGE_SIZE = 100
_TOLERANT = ScimPolicy(
    # What Entra ID and Okta send beside what is kept here, and how Entra ID removes members and adds addresses.
    unknown=ScimPolicy.Unknown.ignore,
    remove_value_as_filter=ScimPolicy.RemoveValue.apply,
    unmatched_path_filter=ScimPolicy.UnmatchedPathFilter.create,
)

Endpoint = Callable[[Request], Awaitable[Response]]
ReportRefusal = Callable[[tuple[object, ...], Reason], Awaitable[None]]
"""Reports a refused call to audit, once for each event id."""


@dataclass(slots=True, eq=False)
class ScimApi:
    """The routes of one provisioner's endpoint.

    `on_request` is called with each authenticated request.
    """

    view: DirectoryView
    writer: ProvisioningWriter
    tokens: Tokens
    clock: Clock
    _: KW_ONLY
    url: str | None
    on_request: Callable[[], None]
    report_refusal: ReportRefusal
    _wrong_tokens: WrongTokens = field(init=False, default_factory=WrongTokens)

    def routes(self) -> list[BaseRoute]:
        found: dict[str, dict[str, Endpoint]] = {
            "/ServiceProviderConfig": {"GET": self._config},
            **self._discovery_routes("/ResourceTypes", resource_types),
            **self._discovery_routes("/Schemas", schemas),
            "/.search": {"POST": self._search_all},
            "/Users": {"GET": self._list_users, "POST": self._create_user},
            "/Users/.search": {"POST": self._list_users},
            "/Users/{id}": {
                "GET": self._get_user,
                "PUT": self._replace_user,
                "PATCH": self._patch_user,
                "DELETE": self._delete_user,
            },
            "/Groups": {"GET": self._list_groups, "POST": self._create_group},
            "/Groups/.search": {"POST": self._list_groups},
            "/Groups/{id}": {
                "GET": self._get_group,
                "PUT": self._replace_group,
                "PATCH": self._patch_group,
                "DELETE": self._delete_group,
            },
            "/{rest:path}": dict.fromkeys(_METHODS, _not_found),
        }
        return [
            Route(BASE + path, self._guarded(endpoints, path), methods=_METHODS)
            for path, endpoints in found.items()
        ]

    # --- discovery ---

    async def _config(self, request: Request) -> Response:
        return _scim_response(service_provider_config(self._base(request)))

    def _discovery_routes(
        self, path: str, catalogue: Callable[[str], Mapping[str, Resource[Any]]]
    ) -> dict[str, dict[str, Endpoint]]:
        async def list_all(request: Request) -> Response:
            if "filter" in request.query_params:  # RFC 7644, 4
                raise ForbiddenException(detail="what the endpoint says of itself cannot be filtered")
            return _scim_response(_list_response(list(catalogue(self._base(request)).values())))

        async def resource(request: Request) -> Response:
            found = catalogue(self._base(request)).get(request.path_params["id"])
            if found is None:
                raise NotFoundException(detail=f"there is no {path[1:-1]} of that id")
            return _scim_response(found)

        return {path: {"GET": list_all}, path + "/{id}": {"GET": resource}}

    # --- users ---

    async def _list_users(self, request: Request) -> Response:
        url = self._base(request)
        search = await _search(request, User)
        return _page_response(
            search, [user_resource(resource, url, self.view.id) for resource in self.view.all()]
        )

    async def _create_user(self, request: Request) -> Response:
        user = User.model_validate_json(
            await _read_body(request), scim_ctx=Context.RESOURCE_CREATION_REQUEST, scim_policy=_TOLERANT
        )
        return self._user(request, await self.writer.create_user(user), Context.RESOURCE_CREATION_RESPONSE)

    async def _get_user(self, request: Request) -> Response:
        return self._user(request, self.writer.user(request.path_params["id"]))

    async def _replace_user(self, request: Request) -> Response:
        user = User.model_validate_json(
            await _read_body(request), scim_ctx=Context.RESOURCE_REPLACEMENT_REQUEST, scim_policy=_TOLERANT
        )
        return self._user(request, await self.writer.replace_user(request.path_params["id"], user))

    async def _patch_user(self, request: Request) -> Response:
        patch = PatchOp[User].model_validate_json(
            await _read_body(request), scim_ctx=Context.RESOURCE_PATCH_REQUEST, scim_policy=_TOLERANT
        )
        return self._user(request, await self.writer.patch_user(request.path_params["id"], patch))

    async def _delete_user(self, request: Request) -> Response:
        await self.writer.delete_user(request.path_params["id"])
        return Response(status_code=204)

    def _user(
        self, request: Request, record: UserRecord, context: Context = Context.RESOURCE_QUERY_RESPONSE
    ) -> Response:
        parameters = _parameters(request, ResponseParameters[User])
        resource = user_resource(record, self._base(request), self.view.id)
        return _scim_response(resource, context, parameters)

    # --- groups ---

    async def _list_groups(self, request: Request) -> Response:
        search = await _search(request, Group)
        return _page_response(search, [self._group_of(request, link) for link in self.view.links()])

    async def _create_group(self, request: Request) -> Response:
        group = Group.model_validate_json(
            await _read_body(request), scim_ctx=Context.RESOURCE_CREATION_REQUEST, scim_policy=_TOLERANT
        )
        link = await self.writer.create_group(group)
        return self._group(request, link, Context.RESOURCE_CREATION_RESPONSE)

    async def _get_group(self, request: Request) -> Response:
        return self._group(request, self.writer.group(request.path_params["id"]))

    async def _replace_group(self, request: Request) -> Response:
        group = Group.model_validate_json(
            await _read_body(request), scim_ctx=Context.RESOURCE_REPLACEMENT_REQUEST, scim_policy=_TOLERANT
        )
        return self._group(request, await self.writer.replace_group(request.path_params["id"], group))

    async def _patch_group(self, request: Request) -> Response:
        patch = PatchOp[Group].model_validate_json(
            await _read_body(request), scim_ctx=Context.RESOURCE_PATCH_REQUEST, scim_policy=_TOLERANT
        )
        return self._group(request, await self.writer.patch_group(request.path_params["id"], patch))

    async def _delete_group(self, request: Request) -> Response:
        await self.writer.delete_group(request.path_params["id"])
        return Response(status_code=204)

    def _group(
        self, request: Request, link: GroupLink, context: Context = Context.RESOURCE_QUERY_RESPONSE
    ) -> Response:
        parameters = _parameters(request, ResponseParameters[Group])
        return _scim_response(self._group_of(request, link), context, parameters)

    def _group_of(self, request: Request, link: GroupLink) -> Group:
        members = self.view.members(link.group)
        provisioner = self.view.provisioner()
        return group_resource(provisioner, link.group, link.external_id, members, self._base(request))

    async def _search_all(self, request: Request) -> Response:
        search = await _search(request, User | Group)
        url = self._base(request)
        users = [user_resource(resource, url, self.view.id) for resource in self.view.all()]
        return _page_response(
            search, [*users, *(self._group_of(request, link) for link in self.view.links())]
        )

    # --- around each ---

    def _base(self, request: Request) -> str:
        return (self.url or str(request.base_url).rstrip("/") + BASE).rstrip("/")

    def _guarded(self, endpoints: Mapping[str, Endpoint], path: str) -> Endpoint:
        """Authenticate the caller by its bearer token, and turn errors into answers (RFC 7644, 3.12)."""

        async def guarded(request: Request) -> Response:
            response = await self._authenticate(request)
            if response is None:
                self.on_request()
                endpoint = endpoints.get(request.method)
                if endpoint is None:
                    allowed = {"Allow": ", ".join(endpoints)}
                    response = _failure(405, f"{request.method} has no meaning here", headers=allowed)
                else:
                    response = await self._respond(endpoint, request)
            HTTP_REQUESTS.labels(f"{request.method} {BASE}{path}", response.status_code).inc()
            return response

        return guarded

    async def _authenticate(self, request: Request) -> Response | None:
        """None if the bearer token is valid; otherwise the answer, 401 or 429."""
        if self.tokens.name_of(request.headers.get("authorization")) is not None:
            return None
        now_ms = self.clock.now_ms()
        if not self._wrong_tokens.add(now_ms):
            return _failure(
                429,
                "too many calls without a token that is let in",
                headers={"Retry-After": str(WRONG_WINDOW_MS // 1000)},
            )
        where = request.client.host if request.client else "unknown"
        log.warning("a call from %s without a token that is let in", where)
        reason = Reason(
            code=Code.TOKEN_UNKNOWN, message=f"a call from {where} without a token that is let in"
        )
        await self.report_refusal((uuid.uuid4(),), reason)
        return _failure(
            401,
            "this needs a bearer token that is let in",
            headers={"WWW-Authenticate": 'Bearer realm="scim"'},
        )

    async def _respond(self, endpoint: Endpoint, request: Request) -> Response:
        try:
            with _TOLERANT:
                return await endpoint(request)
        except SCIMException as error:
            return _error(error.to_error())
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            return _error(next(iter(Error.from_validation_errors(found)), Error(status=400)))
        except RefusedError as error:
            return _failure(403, f"{error.code}: {error}")
        except (NotAnsweredError, UnavailableError) as error:
            return _failure(503, str(error), headers={"Retry-After": "10"})
        except RingfenceError as error:
            return _failure(400, f"{error.code}: {error}", Code.INVALID_VALUE)


_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


async def _not_found(request: Request) -> Response:
    raise NotFoundException(detail="there is nothing of that name; see /ResourceTypes")


async def _read_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise PayloadTooLargeException(detail=f"a request has at most {MAX_BODY_BYTES} bytes")
    return body


def _parameters(request: Request, model: Any) -> Any:
    names = ("attributes", "excludedAttributes", "filter", "sortBy", "sortOrder", "startIndex", "count")
    query = {name: request.query_params[name] for name in names if name in request.query_params}
    return model.model_validate(query, scim_policy=_TOLERANT)


async def _search(request: Request, model: Any) -> Any:
    """The search parameters: of the query, or with POST of the body (RFC 7644, 3.4.3)."""
    if request.method == "GET":
        return _parameters(request, SearchRequest[model])
    return SearchRequest[model].model_validate_json(
        await _read_body(request), scim_ctx=Context.SEARCH_REQUEST, scim_policy=_TOLERANT
    )


def _page_response(search: Any, resources: Sequence[Any]) -> Response:
    """One page of a list: filtered, sorted, from `startIndex` on."""
    found = [resource for resource in resources if search.filter is None or search.filter.match(resource)]
    if search.sort_by is not None:
        found = search.sort(found)
    count = min(_DEFAULT_PAGE_SIZE if search.count is None else search.count, MAX_RESULTS)
    start = search.start_index or 1
    return _scim_response(
        _list_response(found[start - 1 : start - 1 + count], len(found), start), parameters=search
    )


def _list_response(resources: Sequence[Any], total: int | None = None, start: int = 1) -> ListResponse[Any]:
    # One of the kind, or of both where both were searched.
    models = list(dict.fromkeys(type(resource) for resource in resources)) or [User]
    model: Any = ListResponse[functools.reduce(operator.or_, models)]  # type: ignore[misc]
    found: ListResponse[Any] = model(
        total_results=len(resources) if total is None else total,
        items_per_page=len(resources),
        start_index=start,
        resources=list(resources),
    )
    return found


def _scim_response(
    resource: Any, context: Context = Context.RESOURCE_QUERY_RESPONSE, parameters: Any = None
) -> Response:
    content = resource.model_dump(scim_ctx=context, response_parameters=parameters)
    created = context is Context.RESOURCE_CREATION_RESPONSE
    location = resource.meta.location if created else None
    headers = {"Location": str(location)} if location else None
    return JSONResponse(content, 201 if created else 200, headers, MEDIA_TYPE)


def _failure(
    status: int, detail: str, scim_type: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    return _error(Error(status=status, detail=detail, scim_type=scim_type), headers)


def _error(error: Error, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(error.model_dump(), error.status or 400, headers, MEDIA_TYPE)
