# How long a credential may live, in seconds.
package ringfence.limits

# Nobody gets a credential for longer than this, whatever the target allows.
longest_s := 3600

deny contains {"code": "ttl_too_long", "message": sprintf("%v s is longer than the %v s that policy allows", [ttl_s, longest_s])} if {
	not short_enough
}

deny contains {"code": "ttl_beyond_task", "message": "the task ends before a credential could live"} if not some_life_left

# `null` is less than any number in Rego.
short_enough if {
	is_number(input.request.ttl_s)
	input.request.ttl_s <= longest_s
}

some_life_left if max_ttl_s >= 1

# Counted from the request, not from now: a person who approves has to know how long the credential will live.
# (The end of the lease is the end of the task at the latest: code sees to that.)
max_ttl_s := min([longest_s, input.target.max_ttl_s, input.task.not_after - input.request.requested_at_s]) if {
	is_number(input.target.max_ttl_s)
}

ttl_s := object.get(input, ["request", "ttl_s"], "unknown")
