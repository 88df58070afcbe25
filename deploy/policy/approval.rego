# Whose approval is needed, on top of the target's own floors (code adds those, and asks the people).
# One of: "sponsor", "second_person" (another sponsor), "operator" (one who is neither sponsor nor user of it).
package ringfence.approval

# Changing production takes the agent's sponsor, however low the target's floor is.
required contains "sponsor" if {
	some permission in input.request.scope
	changes_something(permission)
	reaches_production(permission)
}

changes_something(permission) if {
	some verb in permission.verbs
	not reading(verb)
}

# Reading is `read`, `list` or `get`, and a verb of several words that begins so: `get-logs`, `list_users`, `read:all`.
# So is what ends in `:read`, as scopes of APIs do: `contents:read`. Only whole words count: `readwrite` is not reading.
reading(verb) if verb in {"read", "list", "get"}

reading(verb) if strings.any_prefix_match(verb, reading_words)

reading(verb) if endswith(verb, ":read")

reading_words := [
	"read-", "read_", "read.", "read:",
	"list-", "list_", "list.", "list:",
	"get-", "get_", "get.", "get:",
]

# A permission reaches production where its target is production, or one of its resources is in it.
reaches_production(permission) if permission.target in production

reaches_production(permission) if {
	some resource in permission.resources
	some segment in split(resource, "/")
	segment in production
}

# A wildcard covers production too, unless what stands before it names another environment: `env/qa/*`, `staging/**`.
reaches_production(permission) if {
	some resource in permission.resources
	segments := split(resource, "/")
	some place, segment in segments
	some name in production
	may_stand_for(segment, name)
	not elsewhere(segment, [earlier | some at, earlier in segments; at < place])
}

# `**`, `*`, `prod*`, `*tion`.
may_stand_for(segment, name) if {
	parts := split(segment, "*")
	count(parts) > 1
	startswith(name, parts[0])
	endswith(name, parts[count(parts) - 1])
}

elsewhere(segment, before) if {
	anything(segment)
	before[0] in {"env", "environment"}
	before[1]
}

elsewhere(segment, before) if {
	anything(segment)
	some name in before
	name in {"dev", "qa", "stage", "staging", "test"}
}

# Whoever asks for `env/staging/prod*` means what is called so.
anything(segment) if segment in {"*", "**"}

production := {"prod", "production"}
