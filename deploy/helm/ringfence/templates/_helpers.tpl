{{/* Labels that select the pods of one part. They never change: a StatefulSet's selector cannot. Input: root, name. */}}
{{- define "ringfence.selector" -}}
app.kubernetes.io/name: ringfence
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end }}

{{/* Labels of every object. Input: root, name. */}}
{{- define "ringfence.labels" -}}
{{ include "ringfence.selector" . }}
app.kubernetes.io/part-of: ringfence
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* The image of one part: its own, or that of all. Input: root, own. */}}
{{- define "ringfence.image" -}}
{{- $all := .root.Values.image }}
{{- $own := .own | default dict }}
{{- $repository := $own.repository | default $all.repository }}
{{- if $own.digest }}{{ $repository }}@{{ $own.digest }}
{{- else if $own.tag }}{{ $repository }}:{{ $own.tag }}
{{- else if $all.digest }}{{ $repository }}@{{ $all.digest }}
{{- else }}{{ $repository }}:{{ $all.tag | default .root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* Environment variables, of a map of settings; the later map wins. Input: a list of maps. Empty values are left out. */}}
{{- define "ringfence.env" -}}
{{- $all := dict }}
{{- range . }}{{ $all = mergeOverwrite $all (deepCopy (. | default dict)) }}{{ end }}
{{- range $name, $value := $all }}
{{- if $value }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{/* What all pods have, as the restricted Pod Security Standard asks. Input: root. */}}
{{- define "ringfence.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* What all containers have. */}}
{{- define "ringfence.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Volumes of all pods: the files of Secrets, and memory. Input: a list of Secrets. */}}
{{- define "ringfence.volumes" -}}
{{- with . }}
- name: secrets
  projected:
    defaultMode: 0400
    sources:
      {{- range . }}
      - secret: {name: {{ . }}}
      {{- end }}
{{- end }}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: 64Mi}
{{- end }}

{{- define "ringfence.mounts" -}}
{{- with . }}
- {name: secrets, mountPath: /run/secrets/ringfence, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
{{- end }}
