package main

// Who is calling, and for which tenant. This file can be read alone, from top to bottom: the
// caller, the decision, open mode, the throttle, the keys.
//
// Defended: someone without a key, or with a guessed, mistyped, expired, deactivated or replaced
// one, or with a stolen copy of the database (it holds digests, not keys), gets nothing. While
// users_table may exist but is missing, unreadable or unreachable, everyone gets 503: doubt never
// opens the door. A change by the operator holds from the next request on, on every server,
// because nothing about a key is cached.
//
// Not defended: whoever reads a key on its way (use TLS), or where its user keeps it, has it.
// Whoever may write to users_table, or controls this process, decides who gets in.
//
// A key is 256 random bits, so one fast SHA-256 is the right digest of it. Failures are throttled
// to spare the log and the database, not because guessing could succeed.

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
	// openTenant owns all data while there is no users_table.
	openTenant = "00000000-0000-0000-0000-000000000000"

	// authTimeout bounds the wait for a connection and for the database's answer; then the
	// request gets 503. A healthy database answers in a millisecond.
	authTimeout = 5 * time.Second

	// touchTimeout bounds the note of a key's last use, which nobody waits for.
	touchTimeout = 5 * time.Second

	// lastUsePrecision is how old a noted last use may become before it is noted anew: a write
	// for each request would cost more than the request.
	lastUsePrecision = 5 * time.Minute

	// failureBurst is how many bad keys of one address in a minute get 401; more get 429. No
	// mistake in a script reaches it.
	failureBurst = 300

	// maxAddresses are counted at a time, which takes a few megabytes at most.
	maxAddresses = 10_000

	keyIDLength = 8
)

// Caller is whom a request acts for. Only this file makes one; every method of the store that
// touches tenant data takes it.
type Caller struct {
	tenant   string // a UUID
	email    string // "" in open mode
	keyID    string // likewise
	readOnly bool
	open     bool // there is no users_table, and everyone is this caller
}

// operatorOf is the Caller of a command about one tenant's data, which the tables' owner gives.
func operatorOf(tenant string) Caller { return Caller{tenant: tenant} }

// denialKind is what a refused caller is told. server.go gives each kind its HTTP status.
type denialKind string

const (
	noKeyGiven     denialKind = "API key required. Please provide X-API-Key header."
	badKeyGiven    denialKind = "Invalid or inactive API key."
	tooManyBadKeys denialKind = "Too many failed authentications. Try again in a minute."
	usersUnknown   denialKind = "The database is not available."
	usersRequired  denialKind = "Authentication is required but not set up."
	foreignHost    denialKind = "The Host header names another host than this server."
	crossOrigin    denialKind = "Cross-origin requests are refused."
)

// denial is the error of a caller that is not let in.
type denial struct {
	kind   denialKind
	reason string // for the log alone
	quiet  bool   // the log has had enough of these from this address
}

func (d *denial) Error() string { return string(d.kind) }

// keyRecord is what the database knows of a user and a key. It holds facts; judge decides.
type keyRecord struct {
	userID, tenant, email string
	readOnly, active      bool
	digest                []byte     // of the current key
	previousDigest        []byte     // of the key before it, if that was given a grace
	now                   time.Time  // by the database's clock, as are the times below
	expiresAt             *time.Time // nil: never
	previousEndsAt        *time.Time // the end of the grace; nil: there is no grace
	lastUsedAt            *time.Time // nil: not used yet
}

// keyStore is the part of the database that decides who gets in.
type keyStore interface {
	// UsersTableExists: true is present, false is proven absent, an error is neither.
	UsersTableExists(ctx context.Context) (bool, error)

	// LookupKey finds a user, in whatever state, by a key's SHA-256 digest. If there is none, the
	// record has no digest.
	LookupKey(ctx context.Context, digest []byte) (keyRecord, error)

	// TouchKey notes that the user's key was used now.
	TouchKey(ctx context.Context, userID string) error
}

// authenticator decides for every request; it lives as long as the server.
type authenticator struct {
	keys        keyStore
	requireAuth bool   // without users_table refuse everyone, rather than admit everyone
	host        string // the host that the server was told to listen on

	badKeys, missingKeys failures
	touching             atomic.Bool // a last use is being written

	// latched: users_table was seen. From then on its absence is a fault, not an invitation.
	latched atomic.Bool
}

// authenticate returns whom r acts for, or a *denial.
func (a *authenticator) authenticate(r *http.Request) (Caller, error) {
	ctx, cancel := context.WithTimeout(r.Context(), authTimeout)
	defer cancel()
	if !a.latched.Load() {
		exists, err := a.keys.UsersTableExists(ctx)
		if err != nil {
			return Caller{}, &denial{kind: usersUnknown, reason: "users_table: " + err.Error()}
		}
		if !exists {
			return a.openCaller(r)
		}
		a.latched.Store(true)
	}
	values := r.Header.Values("X-API-Key")
	if len(values) == 0 || len(values) == 1 && values[0] == "" {
		tooMany := a.missingKeys.add(r.RemoteAddr) > failureBurst
		return Caller{}, &denial{kind: noKeyGiven, reason: "no key", quiet: tooMany}
	}
	if len(values) > 1 || !wellFormedKey(values[0]) {
		return Caller{}, a.refuse(r, "malformed key")
	}
	return a.judge(ctx, r, values[0])
}

// judge looks up a well-formed key and decides whether it opens the door. All refusals are the
// same to the client; the log gets the reason and the id, which may be shown.
func (a *authenticator) judge(ctx context.Context, r *http.Request, key string) (Caller, error) {
	digest := sha256.Sum256([]byte(key))
	id := key[len("tdb_"):][:keyIDLength]
	k, err := a.keys.LookupKey(ctx, digest[:])
	if err != nil {
		return Caller{}, &denial{kind: usersUnknown, reason: "key lookup: " + err.Error()}
	}
	// The database has compared already, but not in constant time; nor is that code read here.
	isCurrent := sameDigest(digest[:], k.digest)
	isPrevious := sameDigest(digest[:], k.previousDigest)
	switch {
	case !isCurrent && !isPrevious:
		return Caller{}, a.refuse(r, "unknown key")
	case !k.active:
		return Caller{}, a.refuse(r, "deactivated key "+id)
	case k.expiresAt != nil && !k.now.Before(*k.expiresAt):
		return Caller{}, a.refuse(r, "expired key "+id)
	case isPrevious && !k.inGrace():
		return Caller{}, a.refuse(r, "replaced key "+id)
	}
	a.noteUse(ctx, k)
	return Caller{tenant: k.tenant, email: k.email, keyID: id, readOnly: k.readOnly}, nil
}

func sameDigest(a, b []byte) bool { return subtle.ConstantTimeCompare(a, b) == 1 }

// inGrace tells whether the key before the current one still works. Without an end of its grace
// it does not.
func (k *keyRecord) inGrace() bool {
	return k.previousEndsAt != nil && k.now.Before(*k.previousEndsAt)
}

// refuse is the answer to any key that does not open the door: the same bytes whatever the reason,
// until one address has sent too many.
func (a *authenticator) refuse(r *http.Request, reason string) error {
	count := a.badKeys.add(r.RemoteAddr)
	if count <= failureBurst {
		return &denial{kind: badKeyGiven, reason: reason}
	}
	// The log gets the first of those that are throttled.
	return &denial{kind: tooManyBadKeys, reason: reason, quiet: count > failureBurst+1}
}

// noteUse writes down that a key was used, at most every lastUsePrecision. It works beside the
// request, one at a time. What it misses a later request notes, so its error is of no interest: a
// database that fails shows where it matters.
func (a *authenticator) noteUse(ctx context.Context, k keyRecord) {
	if k.lastUsedAt != nil && k.now.Sub(*k.lastUsedAt) < lastUsePrecision {
		return
	}
	if !a.touching.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer a.touching.Store(false)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), touchTimeout)
		defer cancel()
		_ = a.keys.TouchKey(ctx, k.userID)
	}()
}

// openCaller admits r without a key, because there is no users_table. A web page must not be able
// to use its visitor's browser for that: neither by a cross-origin request, nor by a name of its
// own that resolves to this server (DNS rebinding).
func (a *authenticator) openCaller(r *http.Request) (Caller, error) {
	if a.requireAuth {
		return Caller{}, &denial{kind: usersRequired, reason: "no users_table"}
	}
	if !a.isOwnHost(r.Host) {
		return Caller{}, &denial{kind: foreignHost, reason: "foreign host"}
	}
	if err := new(http.CrossOriginProtection).Check(r); err != nil {
		return Caller{}, &denial{kind: crossOrigin, reason: "cross-origin"}
	}
	return Caller{tenant: openTenant, open: true}, nil
}

// isOwnHost tells whether a Host header names this server by something that no foreign page can
// bring its visitor's browser to send.
func (a *authenticator) isOwnHost(header string) bool {
	host := (&url.URL{Host: header}).Hostname()
	if host == "" {
		return false
	}
	if isLoopback(host) || host == a.host {
		return true
	}
	// A server on all addresses may be called by any of them: an address cannot be rebound.
	listensOn := net.ParseIP(a.host)
	return listensOn != nil && listensOn.IsUnspecified() && net.ParseIP(host) != nil
}

// isLoopback tells whether host, a name or an address without port, is this machine.
func isLoopback(host string) bool {
	address := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || address != nil && address.IsLoopback()
}

// failures counts refusals by address within a minute.
type failures struct {
	mu        sync.Mutex
	minute    time.Time
	byAddress map[string]int
}

// otherAddresses are counted together, once maxAddresses are known in a minute.
const otherAddresses = "others"

// add counts one more refusal of remote, an address with port, and returns how many that makes.
// X-Forwarded-For is not trusted: anyone can write it.
func (f *failures) add(remote string) int {
	address, _, err := net.SplitHostPort(remote)
	if err != nil {
		address = remote // net/http has always sent an address with port so far
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	minute := time.Now().Truncate(time.Minute)
	if minute != f.minute {
		f.minute = minute
		f.byAddress = map[string]int{}
	}
	_, known := f.byAddress[address]
	if !known && len(f.byAddress) >= maxAddresses {
		address = otherAddresses
	}
	f.byAddress[address]++
	return f.byAddress[address]
}

// A key is "tdb_", an id that may be shown, "_", 32 random bytes in base64url, and a CRC-32 that
// tells a typo from a key.
var keyPattern = regexp.MustCompile(`^(tdb_[a-z2-7]{8}_[A-Za-z0-9_-]{43})[A-Za-z0-9_-]{6}$`)

// secretPattern finds a key in a text, or what is left of one.
var secretPattern = regexp.MustCompile(`tdb_[a-z2-7]{8}_[A-Za-z0-9_-]*`)

// newKey makes a key, and returns its id and digest too. It is the only source of keys.
// crypto/rand ends the program if it fails.
func newKey() (key, id string, digest []byte) {
	secret := make([]byte, 32)
	rand.Read(secret)
	id = strings.ToLower(rand.Text()[:keyIDLength]) // rand.Text writes base32
	key = withChecksum("tdb_" + id + "_" + base64.RawURLEncoding.EncodeToString(secret))
	sum := sha256.Sum256([]byte(key))
	return key, id, sum[:]
}

// withChecksum appends the CRC-32 of body to it.
func withChecksum(body string) string {
	sum := binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE([]byte(body)))
	return body + base64.RawURLEncoding.EncodeToString(sum)
}

// wellFormedKey tells whether key could be one of ours. It is no control: anyone can compute a
// checksum.
func wellFormedKey(key string) bool {
	parts := keyPattern.FindStringSubmatch(key)
	return parts != nil && withChecksum(parts[1]) == key
}
