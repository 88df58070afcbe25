# METADATA
# title: The decision on one action of an agent, through the gateway
# description: |
#   Entry point: data.ringfence.action.decision. The input holds the action, the lease that it uses, the verified
#   records behind it, and what the task did before (`earlier`). As with credentials, code checks before that the action is within the lease and within what
#   task, ceiling and entitlements allow by now; a rule can only deny, ask for approval or shorten.
package ringfence.action

# A gateway may go by one decision for so long, for the same action.
longest_s := 5

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
	"approvals": sort(approvals),
	"max_ttl_s": max_ttl_s,
}

# Whose word each single action waits for: "sponsor", "second_person" or "operator"; one of them, as one person is asked.
# A target's record says it of its verbs. What else should wait is a rule of your own, in a file of this package.
approvals contains class if {
	some verb in input.target.verbs
	verb.verb == input.action.verb
	class := object.get(verb, "ask", "none")
	class != "none"
}

# By their whole names: see decision.rego.
denials := (data.ringfence.identity.deny | data.ringfence.scope.lacking) | deny

# One task may do so much in a minute, at all targets together, by each gateway.
longest_minute := 6000

deny contains {"code": "lease_ended", "message": "the lease has ended; ask for a new credential"} if not lease_active

deny contains {"code": "lease_other_agent", "message": "the lease is another agent's"} if not lease_is_the_agents

deny contains {"code": "other_target", "message": "the action is at another target than the one it was judged by"} if {
	not at_the_target
}

deny contains {"code": "rate_exceeded", "message": sprintf("the task did %v things in the last minute; wait", [last_minute])} if {
	not slow_enough
}

lease_active if {
	input.lease.status == "active"
	input.now_s < input.lease.deadline
}

lease_is_the_agents if input.lease.agent_id == input.agent.agent_id

at_the_target if input.action.target_id == input.target.target_id

# What is not known would be without limit. `null` is less than any number in Rego.
slow_enough if {
	is_number(input.earlier.last_minute)
	input.earlier.last_minute < longest_minute
}

last_minute := object.get(input, ["earlier", "last_minute"], "an unknown number of")

max_ttl_s := min([longest_s, input.lease.deadline - input.now_s])
