# METADATA
# title: The decision on an agent's request for a credential
# description: |
#   Entry point: data.ringfence.issuance.decision. The input holds the request and the verified records that it is held
#   against; docs/policy.md has an example. A rule can deny, ask for approval or shorten; it can never widen: what
#   the task, the agent's ceiling or the user's entitlements do not allow is denied by code, whatever is said here.
package ringfence.issuance

# Rules of other packages are called by their whole names: of an imported package regorus would evaluate every rule for
# each of them, at more than twice the time.

# What stands where the rules below cannot be evaluated at all.
default decision := {
	"allow": false,
	"deny": [{"code": "undecided", "message": "the input lacks what the rules need"}],
	"approvals": [],
	"max_ttl_s": 0,
}

decision := {
	"allow": count(denials) == 0,
	"deny": sort(denials),
	"approvals": sort(data.ringfence.approval.required | data.ringfence.history.required),
	"max_ttl_s": data.ringfence.limits.max_ttl_s,
	"notes": sort(data.ringfence.history.notes),
}

denials := union({
	data.ringfence.identity.deny,
	data.ringfence.scope.deny,
	data.ringfence.limits.deny,
	data.ringfence.combinations.deny,
	data.ringfence.history.deny,
	data.ringfence.delivery.deny,
})
