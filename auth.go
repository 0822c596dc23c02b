package main

// Who is calling, and for which tenant. This file can be read alone.
//
// Defended: whoever has no key, or a guessed, mistyped, expired, deactivated or replaced one, or a stolen copy of the
// database (it holds digests, not keys), gets nothing. While users_table may exist but is missing, unreadable or
// unreachable, everyone gets 503: doubt never opens the door. A change by the operator holds from the next request on,
// on every server, because nothing about a key is cached.
//
// Not defended: whoever reads a key on its way (use TLS) or where the client keeps it has it. Whoever may write to
// users_table, or controls this process, decides who gets in.
//
// A key is 256 random bits: one fast SHA-256 is the right digest of it, and failures are throttled only to spare the log.

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	openTenant    = "00000000-0000-0000-0000-000000000000" // owns all data while there is no users_table
	lookupTimeout = 5 * time.Second                        // to get a connection and the answer; then the request gets 503
	failureBurst  = 300                                    // bad keys of one address in a minute; then 429. No mistake in a script does that
	maxAddresses  = 10_000                                 // counted at a time: a few megabytes at most
	unlogged      = "not logged"                           // the reason of a failure beyond those that the log takes
)

// A key is "tdb_", an id that may be shown, "_", 32 random bytes in base64url, and a CRC-32 that tells a typo from a key.
var keyPattern = regexp.MustCompile(`(tdb_[a-z2-7]{8}_[A-Za-z0-9_-]{43})[A-Za-z0-9_-]{6}`)
var secretPattern = regexp.MustCompile(`tdb_[a-z2-7]{8}_[A-Za-z0-9_-]*`) // a key in a text, or what is left of one

// Caller is whom a request acts for. Only this file makes one; every method of store that touches tenant data takes it.
type Caller struct {
	tenant       string // a UUID
	email, keyID string // "" in open mode
	readOnly     bool
}

// keyRecord is what the database knows, by its clock, of a user and a key: the current one, or the one before in its grace.
type keyRecord struct {
	userID, tenant, email     string
	digest                    []byte
	readOnly, active, expired bool
	useIsStale                bool // last_used_at is due
}

// keyLookup finds a user, in whatever state, by a key's SHA-256 digest; if there is none, a record without a digest.
type keyLookup interface {
	LookupKey(ctx context.Context, digest []byte) (keyRecord, error)
}

// authenticator decides for every request; it lives as long as the server.
type authenticator struct {
	keys             keyLookup
	usersTableExists func(context.Context) (bool, error) // false: proven absent; an error: unknown
	touch            func(ctx context.Context, userID string) error
	requireAuth      bool   // refuse everyone, rather than admit everyone, while there is no users_table
	host             string // the host that the server was told to listen on

	failures failures
	touching atomic.Bool // a last_used_at is being written
	latched  atomic.Bool // users_table was seen: from now on its absence is a fault, not an invitation
}

// failures counts refused keys by address within a minute. With maxAddresses it begins anew, so that memory is bounded.
type failures struct {
	sync.Mutex
	minute    time.Time
	byAddress map[string]int
}

// add counts one of kind from remote, an address with port, and returns how many that makes. X-Forwarded-For is not trusted.
func (f *failures) add(kind, remote string) int {
	host, _, _ := net.SplitHostPort(remote) // as net/http has made it
	f.Lock()
	defer f.Unlock()
	if minute := time.Now().Truncate(time.Minute); minute != f.minute || len(f.byAddress) == maxAddresses {
		f.minute, f.byAddress = minute, map[string]int{}
	}
	f.byAddress[kind+host]++
	return f.byAddress[kind+host]
}

// authenticate returns whom r acts for, or an apiError: 401, 403 and 429 refuse the caller, 503 says that it is not known.
func (a *authenticator) authenticate(r *http.Request) (Caller, error) {
	ctx, cancel := context.WithTimeout(r.Context(), lookupTimeout)
	defer cancel()
	if !a.latched.Load() {
		switch exists, err := a.usersTableExists(ctx); {
		case err != nil:
			return Caller{}, &apiError{http.StatusServiceUnavailable, "The database is not available.", "users_table: " + err.Error()}
		case !exists:
			return a.openCaller(r)
		}
		a.latched.Store(true)
	}
	key := strings.Join(r.Header.Values("X-API-Key"), ",") // several are malformed, as no key has a comma
	switch {
	case key == "":
		reason := map[bool]string{true: unlogged, false: "no key"}[a.failures.add("no key ", r.RemoteAddr) > failureBurst]
		return Caller{}, &apiError{http.StatusUnauthorized, "API key required. Please provide X-API-Key header.", reason}
	case !wellFormedKey(key):
		return a.refuse(r, "malformed key")
	}
	digest := sha256.Sum256([]byte(key))
	id := key[len("tdb_"):][:8] // the part that may be shown
	k, err := a.keys.LookupKey(ctx, digest[:])
	if err != nil {
		return Caller{}, &apiError{http.StatusServiceUnavailable, "The database is not available.", "key lookup: " + err.Error()}
	}
	// The database compared already, but not in constant time and not in code that is read here.
	switch {
	case subtle.ConstantTimeCompare(digest[:], k.digest) != 1:
		return a.refuse(r, "unknown key")
	case !k.active:
		return a.refuse(r, "deactivated key "+id)
	case k.expired:
		return a.refuse(r, "expired key "+id)
	}
	if k.useIsStale && a.touching.CompareAndSwap(false, true) {
		go func() { // beside the request, one at a time; what it misses, a later request notes
			defer a.touching.Store(false)
			_ = a.touch(context.WithoutCancel(ctx), k.userID) // best effort: a database that fails shows where it matters
		}()
	}
	return Caller{tenant: k.tenant, email: k.email, keyID: id, readOnly: k.readOnly}, nil
}

// openCaller admits r without a key, there being no users_table. A web page must not be able to use the visitor's
// browser for that: by cross-origin requests, or by a name of its own that resolves to this server (DNS rebinding).
func (a *authenticator) openCaller(r *http.Request) (Caller, error) {
	if a.requireAuth {
		return Caller{}, &apiError{http.StatusServiceUnavailable, "Authentication is required but not set up.", "no users_table"}
	}
	host := (&url.URL{Host: r.Host}).Hostname()
	anyAddress := net.ParseIP(a.host).IsUnspecified() && net.ParseIP(host) != nil // an address cannot be rebound
	if !isLoopback(host) && host != a.host && !anyAddress {
		return Caller{}, &apiError{http.StatusForbidden, "The Host header names another host than this server.", "foreign host"}
	}
	if err := new(http.CrossOriginProtection).Check(r); err != nil {
		return Caller{}, &apiError{http.StatusForbidden, "Cross-origin requests are refused.", "cross-origin"}
	}
	return Caller{tenant: openTenant}, nil
}

// isLoopback tells whether host, a name or an address without port, is this machine.
func isLoopback(host string) bool {
	return host == "localhost" || net.ParseIP(strings.Trim(host, "[]")).IsLoopback()
}

// refuse answers any key that does not open the door, with the same bytes whatever the reason, until it was too often.
func (a *authenticator) refuse(r *http.Request, reason string) (Caller, error) {
	count := a.failures.add("", r.RemoteAddr)
	reason = map[bool]string{true: unlogged, false: reason}[count > failureBurst+1]
	if count > failureBurst {
		return Caller{}, &apiError{http.StatusTooManyRequests, "Too many failed authentications. Try again in a minute.", reason}
	}
	return Caller{}, &apiError{http.StatusUnauthorized, "Invalid or inactive API key.", reason}
}

// newKey makes a key, and returns its id and digest too: the only source of keys. crypto/rand ends the program if it fails.
func newKey() (key, id string, digest []byte) {
	secret := make([]byte, 32)
	rand.Read(secret)
	id = strings.ToLower(rand.Text()[:8]) // rand.Text writes base32
	key = withChecksum("tdb_" + id + "_" + base64.RawURLEncoding.EncodeToString(secret))
	sum := sha256.Sum256([]byte(key))
	return key, id, sum[:]
}

func withChecksum(body string) string {
	return body + base64.RawURLEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE([]byte(body))))
}

// wellFormedKey tells whether key could be one of ours. It is no control: anyone can compute a checksum.
func wellFormedKey(key string) bool {
	found := keyPattern.FindStringSubmatch(key)
	return found != nil && withChecksum(found[1]) == key
}
