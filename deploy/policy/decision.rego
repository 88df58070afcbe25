# METADATA
# title: The decision on an agent's request for a credential
# description: |
#   Entry point: data.ringfence.issuance.decision. The input holds the request and the verified records that it is held
#   against; docs/policy.md has an example. A rule can deny, ask for approval or shorten; it can never widen: what
#   the task, the agent's ceiling or the user's entitlements do not allow is denied by code, whatever is said here.
package ringfence.issuance

import data.ringfence.approval
import data.ringfence.combinations
import data.ringfence.delivery
import data.ringfence.history
import data.ringfence.identity
import data.ringfence.limits
import data.ringfence.scope

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
	"approvals": sort(approval.required | history.required),
	"max_ttl_s": limits.max_ttl_s,
	"notes": sort(history.notes),
}

denials := ((((identity.deny | scope.deny) | limits.deny) | combinations.deny) | history.deny) | delivery.deny
