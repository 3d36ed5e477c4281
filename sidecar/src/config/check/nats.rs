//! What NATS needs, checked.

use super::Check;
use crate::config::{DynamoPlane, Nats, file};
use crate::ingest::subject::{Template, TemplateError};

impl Check {
    pub(super) fn nats(&mut self, nats: &file::Nats) -> Nats {
        let url = nats.url.as_deref().unwrap_or_default();
        let urls: Vec<&str> = url.split(',').map(str::trim).collect();
        for one in &urls {
            if !url.is_empty() && one.parse::<async_nats::ServerAddr>().is_err() {
                // What stands before the @ may be a password.
                let shown = one.rsplit('@').next().unwrap_or_default();
                self.refuse(
                    "nats.url",
                    shown,
                    "must be a NATS URL such as nats://host:4222",
                );
            }
        }
        let subjects = [&nats.json_subject, &nats.workers_subject];
        if nats.dynamo.is_none() && subjects.iter().all(|subject| subject.is_none()) {
            let why = "needs `dynamo`, `json_subject` or `workers_subject`, or nothing is read \
                       from it";
            self.refuse("nats", url, why);
        }
        if nats.replica_sync && nats.dynamo.is_none() {
            let why = "needs nats.dynamo, whose subjects it goes over";
            self.refuse("nats.replica_sync", true, why);
        }
        let mut template = |key: &str, subject: Option<&str>| {
            let template = Template::new(subject?);
            let refuse = |why: TemplateError| {
                self.refuse(key, subject.unwrap_or_default(), &why.to_string());
            };
            template.map_err(refuse).ok()
        };
        let json = template("nats.json_subject", nats.json_subject.as_deref());
        let workers = template("nats.workers_subject", nats.workers_subject.as_deref());
        let workers = workers.map(Box::new);
        if let (Some(stream), None) = (&nats.json_stream, &nats.json_subject) {
            let why = "needs nats.json_subject, which it keeps";
            self.refuse("nats.json_stream", stream, why);
        }
        if let (Some(credentials), Some(_)) = (&nats.credentials_file, &nats.nkey_seed_file) {
            let why = "excludes nkey_seed_file";
            self.refuse("nats.credentials_file", credentials.display(), why);
        }
        let tls = nats.tls.clone().unwrap_or_default();
        if tls.cert_file.is_some() != tls.key_file.is_some() {
            let one = tls.cert_file.as_ref().or(tls.key_file.as_ref());
            let one = one.map_or(String::new(), |p| p.display().to_string());
            self.refuse("nats.tls", one, "cert_file and key_file go together");
        }
        let files = [
            ("nats.credentials_file", nats.credentials_file.as_deref()),
            ("nats.nkey_seed_file", nats.nkey_seed_file.as_deref()),
            ("nats.tls.ca_file", tls.ca_file.as_deref()),
            ("nats.tls.cert_file", tls.cert_file.as_deref()),
            ("nats.tls.key_file", tls.key_file.as_deref()),
        ];
        for (path, file) in files {
            self.readable(path, file);
        }
        Nats {
            urls: urls.into_iter().map(str::to_owned).collect(),
            dynamo: nats.dynamo.as_ref().map(|plane| DynamoPlane {
                namespace: plane.namespace.clone().unwrap_or_default(),
                component: plane.component.clone().unwrap_or_default(),
            }),
            json,
            json_stream: nats.json_stream.clone(),
            workers,
            replica_sync: nats.replica_sync,
            credentials_file: nats.credentials_file.clone(),
            nkey_seed_file: nats.nkey_seed_file.clone(),
            tls: nats.tls.clone(),
        }
    }
}
