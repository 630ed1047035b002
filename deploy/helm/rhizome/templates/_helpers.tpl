{{/* Names and labels. Whatever takes a component takes (list $ "component"). */}}

{{- define "rhizome.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* 30 characters, so that names with a component, a group and a pod's index stay legal. */}}
{{- define "rhizome.fullname" -}}
{{- $name := include "rhizome.name" . -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $full | trunc 30 | trimSuffix "-" -}}
{{- end }}

{{- define "rhizome.component" -}}
{{- printf "%s-%s" (include "rhizome.fullname" (index . 0)) (index . 1) -}}
{{- end }}

{{/* Never changed: selectors are immutable. */}}
{{- define "rhizome.selectorLabels" -}}
app.kubernetes.io/name: {{ include "rhizome.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "rhizome.labels" -}}
{{- $root := index . 0 -}}
{{ include "rhizome.selectorLabels" . }}
app.kubernetes.io/part-of: rhizome
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Values.image.tag | default $root.Chart.AppVersion | trunc 63 | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* No versions: an upgrade that changes nothing else restarts nothing. */}}
{{- define "rhizome.podLabels" -}}
{{ include "rhizome.selectorLabels" . }}
{{- with (index . 0).Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "rhizome.meta" -}}
name: {{ include "rhizome.component" . }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  {{- include "rhizome.labels" . | nindent 2 }}
{{- end }}

{{/* (list $ "gateway" override) */}}
{{- define "rhizome.image" -}}
{{- $root := index . 0 -}}
{{- $name := printf "rhizome-%s:%s" (index . 1) ($root.Values.image.tag | default $root.Chart.AppVersion) -}}
{{- with $root.Values.image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- index . 2 | default $name -}}
{{- end }}

{{- define "rhizome.tlsSecret" -}}
{{- if eq .Values.tls.source "secret" -}}
{{- required "tls.existingSecret must name a Secret with tls.crt, tls.key and ca.crt" .Values.tls.existingSecret -}}
{{- else -}}
{{- include "rhizome.component" (list . "tls") -}}
{{- end -}}
{{- end }}

{{- define "rhizome.serverName" -}}
{{- .Values.tls.serverName | default (printf "%s.internal" (include "rhizome.fullname" .)) -}}
{{- end }}

{{- define "rhizome.apiKeysSecret" -}}
{{- if and .Values.gateway.apiKeys .Values.gateway.apiKeysSecret -}}
{{- fail "gateway.apiKeys and gateway.apiKeysSecret: give one of the two" -}}
{{- end -}}
{{- if .Values.gateway.apiKeys -}}
{{- include "rhizome.component" (list . "api-keys") -}}
{{- else -}}
{{- .Values.gateway.apiKeysSecret -}}
{{- end -}}
{{- end }}

{{/* Every scheduler by its own name, in one order for all who ask. */}}
{{- define "rhizome.schedulers" -}}
{{- $name := include "rhizome.component" (list . "scheduler") -}}
{{- range $index := until (int .Values.scheduler.replicas) -}}
{{- if $index }} {{ end }}{{ printf "%s-%d.%s.%s.svc:30020" $name $index $name $.Release.Namespace }}
{{- end -}}
{{- end }}

{{/* All ready tokenizers behind one name, as they come and go. */}}
{{- define "rhizome.tokenizers" -}}
{{- printf "dns+all:%s.%s.svc:30010" (include "rhizome.component" (list . "tokenizer")) .Release.Namespace -}}
{{- end }}
