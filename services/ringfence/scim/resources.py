"""The SCIM schemas of users and groups (RFC 7643), their mapping to records, and what the discovery endpoints answer
(RFC 7644, 4). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from scim2_models import (
    URN,
    AuthenticationScheme,
    Bulk,
    CaseExact,
    ChangePassword,
    ComplexAttribute,
    ETag,
    Filter,
    Meta,
    Mutability,
    Patch,
    Reference,
    Required,
    Resource,
    ResourceType,
    Schema,
    ServiceProviderConfig,
    Sort,
    Uniqueness,
)

from ringfence.kernel.base.clock import utc_datetime
from ringfence.kernel.base.ids import derived_id
from ringfence.messages.registry import Mail, Provisioning, UserRecord

MAX_RESULTS = 200
"""The longest page of a list."""


def service_provider_config(url: str) -> ServiceProviderConfig:
    """What is there and what is not."""
    return ServiceProviderConfig(
        patch=Patch(supported=True),
        bulk=Bulk(supported=False, max_operations=0, max_payload_size=0),
        filter=Filter(supported=True, max_results=MAX_RESULTS),
        change_password=ChangePassword(supported=False),
        sort=Sort(supported=True),
        etag=ETag(supported=False),
        authentication_schemes=[
            AuthenticationScheme(
                type=AuthenticationScheme.Type.oauthbearertoken,
                name="Bearer token",
                description="A token that `ringfence provisioner new-token` printed",
                spec_uri=Reference("https://datatracker.ietf.org/doc/html/rfc6750"),
                primary=True,
            )
        ],
        meta=Meta(resource_type="ServiceProviderConfig", location=f"{url}/ServiceProviderConfig"),
    )


def resource_types(url: str) -> dict[str, ResourceType]:
    """Users and groups, by id."""
    found = {}
    for model in (User, Group):
        one = ResourceType.from_resource(model)
        one.meta = Meta(resource_type="ResourceType", location=f"{url}/ResourceTypes/{one.id}")
        found[str(one.id)] = one
    return found


def schemas(url: str) -> dict[str, Schema]:
    """What users and groups are made of, by id."""
    found = {}
    for model in (User, Group):
        one = model.to_schema()
        one.meta = Meta(resource_type="Schema", location=f"{url}/Schemas/{one.id}")
        found[str(one.id)] = one
    return found


# The libraries' own User has a dozen attributes more. What is not kept is not declared: a directory that looks at the
# schema sees what it gets.


class FullName(ComplexAttribute):
    """The parts of a name."""

    formatted: str | None = None
    family_name: str | None = None
    given_name: str | None = None


class Email(ComplexAttribute):
    """An address, as the directory has it: nothing is ever sent there."""

    value: str | None = None
    type: str | None = None
    primary: bool | None = None


class Membership(ComplexAttribute):
    """A group that a user is in."""

    value: Annotated[str | None, Mutability.read_only, CaseExact.true] = None
    display: Annotated[str | None, Mutability.read_only] = None


class User(Resource[Any]):
    """A human, as their directory describes them."""

    __schema__ = URN("urn:ietf:params:scim:schemas:core:2.0:User")

    user_name: Annotated[str | None, Uniqueness.server, Required.true] = None
    name: FullName | None = None
    Name: ClassVar[type[ComplexAttribute]] = FullName
    display_name: str | None = None
    active: bool | None = None
    emails: list[Email] | None = None
    Emails: ClassVar[type[ComplexAttribute]] = Email
    groups: Annotated[list[Membership] | None, Mutability.read_only] = None
    Groups: ClassVar[type[ComplexAttribute]] = Membership


class Member(ComplexAttribute):
    """Somebody who is in a group."""

    value: Annotated[str | None, Mutability.immutable, CaseExact.true] = None
    ref: Annotated[Reference[User] | None, Mutability.immutable] = Field(
        None, serialization_alias="$ref", validation_alias="$ref"
    )
    type: Annotated[str | None, Mutability.immutable] = Field(None, examples=["User"])
    display: str | None = None


class Group(Resource[Any]):
    """A group that an operator delegated. Its name is its identity and cannot change."""

    __schema__ = URN("urn:ietf:params:scim:schemas:core:2.0:Group")

    display_name: Annotated[str | None, Required.true, Mutability.immutable] = None
    members: list[Member] | None = None
    Members: ClassVar[type[ComplexAttribute]] = Member


def group_id(provisioner_id: str, group: str) -> str:
    """The SCIM id of a group, derived from its name."""
    return derived_id("scim-group", provisioner_id, group)


def user_resource(record: UserRecord, url: str, provisioner_id: str) -> User:
    state, said = record.state, record.state.provisioned or Provisioning()
    name = FullName(formatted=said.formatted_name, family_name=said.family_name, given_name=said.given_name)
    return User(
        id=state.user_id,
        external_id=said.external_id,
        user_name=said.user_name or state.user_id,
        name=name if name != FullName() else None,
        display_name=said.display_name,
        active=state.status == "active",
        emails=[Email(value=one.value, type=one.type, primary=one.primary) for one in said.emails] or None,
        groups=[Membership(value=group_id(provisioner_id, group), display=group) for group in said.groups]
        or None,
        meta=_meta("User", f"{url}/Users/{state.user_id}", record),
    )


def group_resource(
    provisioner: UserRecord, group: str, external_id: str | None, members: Sequence[UserRecord], url: str
) -> Group:
    id = group_id(provisioner.state.user_id, group)
    return Group(
        id=id,
        external_id=external_id,
        display_name=group,
        members=[Member(value=one.state.user_id, type="User", display=one.state.name) for one in members]
        or None,
        meta=_meta("Group", f"{url}/Groups/{id}", provisioner),
    )


def to_provisioning(user: User, groups: Sequence[str]) -> Provisioning:
    """The attributes of a SCIM user that are kept in the record. Raises ValidationError if one is too long."""
    name = user.name or FullName()
    return Provisioning(
        groups=tuple(groups),
        # Whoever does not say so means that they may: RFC 7643 leaves the meaning of its absence to the service.
        active=user.active is not False,
        user_name=user.user_name,
        external_id=user.external_id,
        display_name=user.display_name,
        formatted_name=name.formatted,
        given_name=name.given_name,
        family_name=name.family_name,
        emails=tuple(
            Mail(value=one.value, type=one.type, primary=one.primary)
            for one in user.emails or ()
            if one.value
        ),
    )


def display_name_of(provisioning: Provisioning, user_id: str) -> str:
    both = " ".join(part for part in (provisioning.given_name, provisioning.family_name) if part)
    return (
        provisioning.display_name or provisioning.formatted_name or both or provisioning.user_name or user_id
    )


def _meta(kind: str, location: str, record: UserRecord) -> Meta:
    first, last = (record.commands[at].appended_at_ms / 1000 for at in (0, -1))
    return Meta(
        resource_type=kind,
        created=utc_datetime(first),
        last_modified=utc_datetime(last),
        location=location,
        version=f'W/"{record.revision}"',
    )
