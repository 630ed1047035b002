{{/* What all pods have in common: placement, rights, environment, files. */}}

{{/* (dict "root" $ "component" "gateway" "values" .Values.gateway): fields of a pod's spec. */}}
{{- define "rhizome.podSpec" -}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Spread over nodes and zones where possible, unless the values say otherwise. */}}
{{- define "rhizome.spread" -}}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- with .values.topologySpreadConstraints }}
  {{- toYaml . | nindent 2 }}
{{- else }}
{{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "rhizome.selectorLabels" (list $.root $.component) | nindent 8 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "rhizome.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* (dict "root" $ "values" ... "metricsPort" 30012): annotations of a pod. */}}
{{- define "rhizome.podAnnotations" -}}
{{- $annotations := dict -}}
{{- if .root.Values.metrics.annotations -}}
{{- $_ := set $annotations "prometheus.io/scrape" "true" -}}
{{- $_ := set $annotations "prometheus.io/path" "/metrics" -}}
{{- $_ := set $annotations "prometheus.io/port" (toString .metricsPort) -}}
{{- end -}}
{{- with .checksum }}{{ $_ := set $annotations "checksum/config" (sha256sum .) }}{{ end -}}
{{- with mergeOverwrite $annotations .root.Values.podAnnotations .values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
(dict "root" $ "service" "gateway" "fields" (dict ...) "config" .Values.gateway.config): environment.
Fields are those of the service's configuration; `fields` is what the chart decides.
*/}}
{{- define "rhizome.env" -}}
{{- $telemetry := .root.Values.telemetry -}}
{{- $fields := dict "log_format" $telemetry.logFormat -}}
{{- with $telemetry.otlpTracesEndpoint -}}
{{- $_ := set $fields "otlp_traces_endpoint" . -}}
{{- $_ := set $fields "trace_sample_ratio" $telemetry.traceSampleRatio -}}
{{- end -}}
{{- if .root.Values.tls.enabled -}}
{{- $_ := set $fields "tls_cert_file" "/etc/rhizome/tls/tls.crt" -}}
{{- $_ := set $fields "tls_key_file" "/etc/rhizome/tls/tls.key" -}}
{{- $_ := set $fields "tls_ca_file" "/etc/rhizome/tls/ca.crt" -}}
{{- $_ := set $fields "tls_server_name" (include "rhizome.serverName" .root) -}}
{{- end -}}
{{- $fields = merge (deepCopy .fields) $fields (.config | default dict) -}}
- {name: HOME, value: /tmp}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- range $key := keys $fields | sortAlpha }}
{{- $value := get $fields $key }}
{{- if kindIs "slice" $value }}{{ $value = join " " $value }}{{ end }}
{{- if not (kindIs "invalid" $value) }}
- {name: {{ printf "RHIZOME__%s__%s" $.service $key | upper }}, value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "rhizome.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/rhizome/tls, readOnly: true}
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Directories, never single files: those would not follow a rotation. */}}
{{- define "rhizome.volumes" -}}
- name: tmp
  emptyDir: {}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "rhizome.tlsSecret" .root }}
    defaultMode: 0440
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* (dict "startup" seconds "port" 30011): probes of a service that is ready once it serves. */}}
{{- define "rhizome.grpcProbes" -}}
startupProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: {{ div .startup 2 }}
readinessProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}
