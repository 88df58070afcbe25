# METADATA
# title: The decision on one action of an agent, through the gateway
# description: |
#   Entry point: data.ringfence.action.decision. The input holds the action, the lease that it uses, and the verified
#   records behind it. As with credentials, code checks before that the action is within the lease and within what
#   task, ceiling and entitlements allow by now; a rule can only deny, ask for approval or shorten.
package ringfence.action

import data.ringfence.identity
import data.ringfence.scope

# A gateway may go by one decision for so long, for the same action.
longest_s := 5

# What stands where the rules below cannot be evaluated at all.
default decision := {
	"allow": false,
	"deny": [{"code": "undecided", "message": "the input lacks what the rules need"}],
	"approvals": [],
	"max_ttl_s": 0,
}

# Nobody is asked here: what takes a person was asked for when the credential was issued.
decision := {
	"allow": count(denials) == 0,
	"deny": sort(denials),
	"approvals": [],
	"max_ttl_s": max_ttl_s,
}

denials := (identity.deny | scope.lacking) | deny

deny contains {"code": "lease_ended", "message": "the lease has ended; ask for a new credential"} if not lease_active

deny contains {"code": "lease_other_agent", "message": "the lease is another agent's"} if not lease_is_the_agents

deny contains {"code": "other_target", "message": "the action is at another target than the one it was judged by"} if {
	not at_the_target
}

lease_active if {
	input.lease.status == "active"
	input.now_s < input.lease.deadline
}

lease_is_the_agents if input.lease.agent_id == input.agent.agent_id

at_the_target if input.action.target_id == input.target.target_id

max_ttl_s := min([longest_s, input.lease.deadline - input.now_s])
